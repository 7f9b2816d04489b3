import Foundation

/// The manifest's prompt section: a conversation in token ids, proved equal to the chat template by the exporter.
public struct PromptSpec {
    enum Segment {
        case ids([Int])
        case image(between: [Int])
        case question(before: String, after: String, trim: Bool)
    }

    struct Tiled {
        let before: [Int]
        let cells: [[[Int]]]
        let rowEnd, whole, after: [Int]
    }

    struct Later {
        let turnEnd: [Int]
        let user: [Segment]?
        let userWithoutImage: [Segment]
    }

    let imageBefore, imageAfter: [Int]
    public let imageToken: Int
    let tiled: Tiled?
    let system: [Int]
    let user: [Segment]
    let userWithoutImage: [Segment]?
    let assistant: [Int]
    let later: Later?
    let refused: [String]

    init(_ fields: Fields) throws {
        var fields = fields
        var image = try fields.fields("image")
        imageBefore = try image.ints("before")
        imageToken = try image.int("token")
        imageAfter = try image.ints("after")
        tiled = try image.find("tiled").map { try Self.tiled(Fields($0, "\(image.place).tiled")) }
        try image.finish()
        system = try fields.ints("system")
        user = try Self.segments(fields.list("user"))
        userWithoutImage = try Self.optional(&fields, "user_without_image")
        assistant = try fields.ints("assistant")
        later = try fields.find("later").map { try Self.later(Fields($0, "\(fields.place).later")) }
        refused = try fields.strings("refused_text")
        try fields.finish()
    }

    private static func tiled(_ given: Fields) throws -> Tiled {
        var fields = given
        let cells = try fields.array("cells").map { row -> [[Int]] in
            guard case .array(let columns) = row else { throw fields.wrong("cells", "rows of lists") }
            return try columns.map {
                guard case .array(let ids) = $0 else { throw fields.wrong("cells", "rows of lists") }
                return try fields.integers(ids, "cells")
            }
        }
        let found = Tiled(
            before: try fields.ints("before"), cells: cells, rowEnd: try fields.ints("row_end"),
            whole: try fields.ints("whole"), after: try fields.ints("after"))
        try fields.finish()
        return found
    }

    private static func later(_ given: Fields) throws -> Later {
        var fields = given
        fields.skip("answer_before")
        let found = Later(
            turnEnd: try fields.ints("turn_end"), user: try optional(&fields, "user"),
            userWithoutImage: try segments(fields.list("user_without_image")))
        try fields.finish()
        return found
    }

    private static func optional(_ fields: inout Fields, _ key: String) throws -> [Segment]? {
        guard case .array(let values)? = fields.find(key) else { return nil }
        return try segments(values.enumerated().map { try Fields($1, "\(fields.place).\(key)[\($0)]") })
    }

    private static func segments(_ list: [Fields]) throws -> [Segment] {
        try list.map { given in
            var fields = given
            let found: Segment
            switch try fields.string("kind") {
            case "ids": found = .ids(try fields.ints("ids"))
            case "image": found = .image(between: try fields.ints("between"))
            case "question":
                found = .question(
                    before: try fields.string("before"), after: try fields.string("after"),
                    trim: try fields.bool("trim", or: false))
            case let kind: throw fields.wrong("kind", "ids, image or question, not \(kind)")
            }
            try fields.finish()
            return found
        }
    }
}

extension PromptSpec {
    /// Ids of the first turn. Throws when a picture is missing or the question holds a refused text.
    func first(_ question: String, _ images: [PreparedImage], _ tokenizer: Tokenizer) throws -> [Int] {
        let segments = images.isEmpty ? userWithoutImage : user
        guard let segments else { throw PocketError("question: needs a picture in this bundle; add one") }
        return try system + turn(segments, question, images, tokenizer) + assistant
    }

    /// Ids of a further turn, which follow an answer; `endedWith` is its last id if that ended it.
    func further(
        _ question: String, _ images: [PreparedImage], _ tokenizer: Tokenizer, endedWith: Int?
    ) throws -> [Int] {
        guard let later else {
            throw PocketError("question: this bundle answers one question at a time; start a new conversation")
        }
        let segments = images.isEmpty ? later.userWithoutImage : later.user
        guard let segments else {
            throw PocketError("question: has a picture, but later questions of this bundle take none; start anew")
        }
        let end = later.turnEnd.first == endedWith ? Array(later.turnEnd.dropFirst()) : later.turnEnd
        return try end + turn(segments, question, images, tokenizer) + assistant
    }

    private func turn(
        _ segments: [Segment], _ question: String, _ images: [PreparedImage], _ tokenizer: Tokenizer
    ) throws -> [Int] {
        for text in refused where question.range(of: text, options: .literal) != nil {
            throw PocketError("question: contains \(text), which stands for a picture; leave it out")
        }
        var ids: [Int] = []
        for segment in segments {
            switch segment {
            case .ids(let fixed):
                ids += fixed
            case .image(let between):
                for (number, image) in images.enumerated() {
                    ids += try (number > 0 ? between : []) + picture(image)
                }
            case .question(let before, let after, let trim):
                ids += try tokenizer.encode(before + (trim ? trimmed(question) : question) + after)
            }
        }
        return ids
    }

    private func picture(_ image: PreparedImage) throws -> [Int] {
        let (rows, columns) = (image.tileRows, image.tileColumns)
        guard let tiled, rows * columns > 0 else { return imageBefore + tokens(image.tokens) + imageAfter }
        if rows > tiled.cells.count || columns > (tiled.cells.map(\.count).min() ?? 0) {
            throw PocketError("prompt.image.tiled: has no ids for \(rows) x \(columns) tiles; re-export")
        }
        var ids = tiled.before
        for row in 0..<rows {
            ids += row > 0 ? tiled.rowEnd : []
            for column in 0..<columns {
                ids += tiled.cells[row][column] + tokens(image.views[row * columns + column].tokens)
            }
        }
        if image.views.count > rows * columns { ids += tiled.whole + tokens(image.views.last!.tokens) }
        return ids + tiled.after
    }

    /// Without the white space at its ends that Python's `str.strip` takes off.
    private func trimmed(_ text: String) -> String {
        func isBlank(_ scalar: Unicode.Scalar) -> Bool {
            switch scalar.value {
            case 0x09...0x0d, 0x1c...0x20, 0x85, 0xa0, 0x1680, 0x2000...0x200a: true
            case 0x2028, 0x2029, 0x202f, 0x205f, 0x3000: true
            default: false
            }
        }
        let scalars = text.unicodeScalars.drop(while: isBlank)
        guard let last = scalars.lastIndex(where: { !isBlank($0) }) else { return "" }
        return String(String.UnicodeScalarView(scalars[...last]))
    }

    private func tokens(_ count: Int) -> [Int] {
        [Int](repeating: imageToken, count: count)
    }
}
