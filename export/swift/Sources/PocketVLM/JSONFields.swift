import Foundation

/// A JSON value as it was written: `true` is no number, and a key that nobody reads can be found.
enum JSON: Decodable, Equatable {
    case null
    case bool(Bool)
    case int(Int)
    case double(Double)
    case string(String)
    case array([JSON])
    case object([String: JSON])

    init(from decoder: any Decoder) throws {
        let value = try decoder.singleValueContainer()
        if value.decodeNil() {
            self = .null
        } else if let found = try? value.decode(Bool.self) {
            self = .bool(found)
        } else if let found = try? value.decode(Int.self) {
            self = .int(found)
        } else if let found = try? value.decode(Double.self) {
            self = .double(found)
        } else if let found = try? value.decode(String.self) {
            self = .string(found)
        } else if let found = try? value.decode([JSON].self) {
            self = .array(found)
        } else {
            self = .object(try value.decode([String: JSON].self))
        }
    }

    static func read(_ file: URL) throws -> JSON {
        let data: Data
        do {
            data = try Data(contentsOf: file)
        } catch {
            throw PocketError("\(file.lastPathComponent): cannot be read (\(error.localizedDescription))")
        }
        do {
            return try JSONDecoder().decode(JSON.self, from: data)
        } catch {
            throw PocketError("\(file.lastPathComponent): is no JSON; copy the bundle again")
        }
    }
}

/// The members of a JSON object. Each is taken once; `finish` refuses what is left, by name.
struct Fields {
    let place: String
    private var left: [String: JSON]

    init(_ value: JSON, _ place: String) throws {
        guard case .object(let members) = value else {
            throw PocketError("\(place): is no object; re-export")
        }
        self.place = place
        left = members
    }

    /// The value of a key; absent and null are the same.
    mutating func find(_ key: String) -> JSON? {
        let found = left.removeValue(forKey: key)
        return found == .null ? nil : found
    }

    mutating func take(_ key: String) throws -> JSON {
        guard let found = find(key) else { throw wrong(key, "a value") }
        return found
    }

    mutating func string(_ key: String) throws -> String {
        guard case .string(let found)? = find(key) else { throw wrong(key, "a text") }
        return found
    }

    mutating func int(_ key: String) throws -> Int {
        guard case .int(let found)? = find(key) else { throw wrong(key, "an integer") }
        return found
    }

    mutating func double(_ key: String) throws -> Double {
        switch find(key) {
        case .int(let found)?: return Double(found)
        case .double(let found)?: return found
        default: throw wrong(key, "a number")
        }
    }

    mutating func bool(_ key: String, or fallback: Bool? = nil) throws -> Bool {
        switch find(key) {
        case .bool(let found)?: return found
        case nil where fallback != nil: return fallback!
        default: throw wrong(key, "true or false")
        }
    }

    mutating func array(_ key: String) throws -> [JSON] {
        guard case .array(let found)? = find(key) else { throw wrong(key, "a list") }
        return found
    }

    mutating func ints(_ key: String) throws -> [Int] {
        try integers(array(key), key)
    }

    mutating func strings(_ key: String) throws -> [String] {
        try array(key).map {
            guard case .string(let found) = $0 else { throw wrong(key, "texts") }
            return found
        }
    }

    mutating func floats(_ key: String) throws -> [Float] {
        try array(key).map {
            switch $0 {
            case .int(let found): return Float(found)
            case .double(let found): return Float(found)
            default: throw wrong(key, "numbers")
            }
        }
    }

    mutating func fields(_ key: String) throws -> Fields {
        try Fields(take(key), "\(place).\(key)")
    }

    /// The objects of a list.
    mutating func list(_ key: String) throws -> [Fields] {
        try array(key).enumerated().map { try Fields($1, "\(place).\(key)[\($0)]") }
    }

    /// Keys whose value this reader has no use for.
    mutating func skip(_ keys: String...) {
        for key in keys { left.removeValue(forKey: key) }
    }

    func integers(_ values: [JSON], _ key: String) throws -> [Int] {
        try values.map {
            guard case .int(let found) = $0 else { throw wrong(key, "integers") }
            return found
        }
    }

    func finish() throws {
        if let key = left.keys.sorted().first {
            throw PocketError("\(place): has the unknown key \(key); this reader is older than the bundle")
        }
    }

    func wrong(_ key: String, _ wanted: String) -> PocketError {
        PocketError("\(place).\(key): wanted \(wanted); re-export")
    }
}
