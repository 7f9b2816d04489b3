import Foundation

struct StandInError: Error, CustomStringConvertible {
    let description: String
}

/// A value as it goes through a pipe: a line of JSON says what follows, then raw little-endian bytes.
struct Sent {
    let dtype: String
    let shape: [Int]
    let data: Data

    /// With a gap after each row, which a reader must step over.
    func array() throws -> MLMultiArray {
        let type = try Pipes.type(dtype)
        let out = MLMultiArray(shape, type, gap: 3)
        let item = MLMultiArray.itemBytes(type)
        let row = (shape.last ?? 1) * item
        let step = ((shape.last ?? 1) + 3) * item
        out.withUnsafeMutableBytes { bytes, _ in
            for index in 0..<(row > 0 ? data.count / row : 0) {
                let from = data.subdata(in: index * row..<(index + 1) * row)
                let place = bytes.baseAddress!.advanced(by: index * step)
                from.withUnsafeBytes { place.copyMemory(from: $0.baseAddress!, byteCount: row) }
            }
        }
        return out
    }
}

enum Pipes {
    private static let directory = ProcessInfo.processInfo.environment["POCKETVLM_STANDIN"] ?? ""
    private static let out = FileHandle(forWritingAtPath: directory + "/to-python")
    private static let back = FileHandle(forReadingAtPath: directory + "/to-swift")

    static func type(_ name: String) throws -> MLMultiArrayDataType {
        switch name {
        case "float32": return .float32
        case "float16": return .float16
        case "int32": return .int32
        default: throw StandInError(description: "no Core ML type for \(name)")
        }
    }

    private static let names: [MLMultiArrayDataType: String] = [
        .float32: "float32", .float16: "float16", .int32: "int32",
    ]

    /// One question and its answer: values by name, and the number of a state that was made.
    static func ask(
        _ what: String, _ path: String, _ function: String?, _ state: Int?, _ inputs: [String: MLMultiArray]
    ) throws -> ([String: Sent], Int?) {
        guard let out, let back else { throw StandInError(description: "POCKETVLM_STANDIN names no pipes") }
        var values: [[String: Any]] = []
        var body = Data()
        for (name, array) in inputs.sorted(by: { $0.key < $1.key }) {
            let shape = array.shape.map(\.intValue)
            let count = shape.reduce(1, *) * MLMultiArray.itemBytes(array.dataType)
            values.append(["name": name, "dtype": names[array.dataType]!, "shape": shape, "bytes": count])
            array.withUnsafeBytes { body.append(contentsOf: $0.prefix(count)) }
        }
        var head: [String: Any] = ["what": what, "path": path, "values": values]
        if let function { head["function"] = function }
        if let state { head["state"] = state }
        try out.write(contentsOf: JSONSerialization.data(withJSONObject: head) + Data([10]) + body)
        return try answer(back)
    }

    private static func answer(_ back: FileHandle) throws -> ([String: Sent], Int?) {
        var line = Data()
        while let byte = try back.read(upToCount: 1), let first = byte.first, first != 10 { line.append(byte) }
        guard let head = try JSONSerialization.jsonObject(with: line) as? [String: Any] else {
            throw StandInError(description: "the evaluator gave no answer")
        }
        if let error = head["error"] as? String { throw StandInError(description: error) }
        var found: [String: Sent] = [:]
        for value in head["values"] as? [[String: Any]] ?? [] {
            var data = Data()
            let count = value["bytes"] as! Int
            while data.count < count, let more = try back.read(upToCount: count - data.count), !more.isEmpty {
                data.append(more)
            }
            found[value["name"] as! String] = Sent(
                dtype: value["dtype"] as! String, shape: value["shape"] as! [Int], data: data)
        }
        return (found, head["state"] as? Int)
    }
}
