import Foundation

/// The bundle's conformance vectors: what every reader must reproduce before it is trusted.
public struct Conformance {
    struct Case {
        let name, question: String
        let image, pixels: Manifest.File
        let shapes: [[Int]]
        let step: Int
        let pixelsTolerance: Double
        let ids: [Int]
        let positions: [[Int]]
        let top: [(id: Int, logit: Double)]
        let logitTolerance: Double
    }

    let session: Session
    let cases: [Case]

    public init(_ session: Session) throws {
        self.session = session
        let file = session.manifest.conformance
        _ = try session.files.data(file)
        var fields = try Fields(JSON.read(session.files.locate(file.path)), "cases.json")
        if try fields.int("cases_version") != 1 { throw fields.wrong("cases_version", "1") }
        cases = try fields.list("cases").map(Self.read)
        try fields.finish()
    }

    /// The first case's picture and question, to measure with.
    public var subject: (image: String, question: String) {
        (cases[0].image.path, cases[0].question)
    }

    /// One line for every difference; empty when this reader conforms.
    ///
    /// `withLogits`: also run the model. `load` decodes a picture file.
    public func differences(withLogits: Bool, load: (URL) throws -> Picture) throws -> [String] {
        try cases.flatMap { try differences($0, withLogits, load) }
    }

    private func differences(_ one: Case, _ withLogits: Bool, _ load: (URL) throws -> Picture) throws -> [String] {
        _ = try session.files.data(one.image)
        let image = try session.prepare(load(session.files.locate(one.image.path)))
        let shapes = image.views.map(\.pixels.shape)
        if shapes != one.shapes { return ["\(one.name): pixels have shapes \(shapes), expected \(one.shapes)"] }
        var found: [String] = []
        let off = try pixelDifference(one, image)
        if !(off <= one.pixelsTolerance) {
            found.append("\(one.name): pixels differ by \(off), allowed \(one.pixelsTolerance)")
        }
        let ids = try session.promptIDs(one.question, [image])
        if ids != one.ids {
            return found + ["\(one.name): prompt ids differ (\(ids.count) ids, expected \(one.ids.count))"]
        }
        if try session.positions(ids, [image]) != one.positions { found.append("\(one.name): positions differ") }
        guard withLogits else { return found }
        let logits = try session.prefill(ids, [session.encode(image)])
        for top in one.top {
            let off = abs(Double(logits[top.id]) - top.logit)
            if !(off <= one.logitTolerance) {
                found.append(
                    "\(one.name): logit of id \(top.id) differs by \(off), allowed \(one.logitTolerance)")
            }
        }
        return found
    }

    private func pixelDifference(_ one: Case, _ image: PreparedImage) throws -> Double {
        let raw = try session.files.data(one.pixels)
        let expected = raw.withUnsafeBytes { bytes in
            (0..<bytes.count / 4).map {
                Float(bitPattern: UInt32(littleEndian: bytes.loadUnaligned(fromByteOffset: 4 * $0, as: UInt32.self)))
            }
        }
        let all = image.views.flatMap(\.pixels.floats)
        let kept = stride(from: 0, to: all.count, by: one.step).map { all[$0] }
        guard kept.count == expected.count else {
            throw PocketError("\(one.pixels.path): holds \(expected.count) values, wanted \(kept.count); re-export")
        }
        return zip(kept, expected).map { Double(abs($0 - $1)) }.max() ?? 0
    }

    private static func read(_ given: Fields) throws -> Case {
        var fields = given
        let top = try fields.list("top").map { given -> (id: Int, logit: Double) in
            var row = given
            return (try row.int("id"), try row.double("logit"))
        }
        let (image, pixels) = (try fields.fields("image"), try fields.fields("pixels"))
        let (shapes, positions) = (try rows(&fields, "pixels_shapes"), try rows(&fields, "positions"))
        let found = Case(
            name: try fields.string("name"), question: try fields.string("question"),
            image: try Manifest.file(image), pixels: try Manifest.file(pixels), shapes: shapes,
            step: try fields.int("pixels_step"), pixelsTolerance: try fields.double("pixels_tolerance"),
            ids: try fields.ints("ids"), positions: positions, top: top,
            logitTolerance: try fields.double("logit_tolerance"))
        try fields.finish()
        return found
    }

    private static func rows(_ fields: inout Fields, _ key: String) throws -> [[Int]] {
        try fields.array(key).map {
            guard case .array(let row) = $0 else { throw PocketError("cases.json: \(key) has no rows; re-export") }
            return try fields.integers(row, key)
        }
    }
}
