import Foundation

/// Cuts a text into the pieces that merges stay within: the `pre_tokenizer` section.
struct PreTokenizer {
    private enum Cut {
        case matches(NSRegularExpression)
        case digits(single: Bool)
    }

    private let cuts: [Cut]

    /// GPT-2's pattern, which `ByteLevel` uses unless told otherwise.
    private static let byteLevel = #"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#

    init(_ step: TokenizerFile.Step?) throws {
        cuts = try Self.cuts(step)
        guard let step, Self.endsInBytes(step) else {
            throw PocketError("tokenizer.json: pre_tokenizer does not end in ByteLevel; unknown to this reader")
        }
    }

    private static func endsInBytes(_ step: TokenizerFile.Step) -> Bool {
        step.type == "ByteLevel" || (step.pretokenizers?.last.map(endsInBytes) ?? false)
    }

    private static func cuts(_ step: TokenizerFile.Step?) throws -> [Cut] {
        guard let step else { return [] }
        switch step.type {
        case "Sequence":
            return try (step.pretokenizers ?? []).flatMap(cuts)
        case "Digits":
            return [.digits(single: step.individual_digits ?? false)]
        case "Split":
            guard step.behavior == "Isolated", step.invert != true, let pattern = step.pattern?.Regex else {
                throw PocketError("tokenizer.json: Split \(step.behavior ?? "") is unknown to this reader")
            }
            return [.matches(try expression(pattern))]
        case "ByteLevel":
            if step.add_prefix_space == true {
                throw PocketError("tokenizer.json: ByteLevel with add_prefix_space is unknown to this reader")
            }
            return step.use_regex == false ? [] : [.matches(try expression(byteLevel))]
        default:
            throw PocketError("tokenizer.json: pre_tokenizer \(step.type) is unknown to this reader")
        }
    }

    /// The tokenizers library means all white space of Unicode by \s; ICU leaves out U+000B and U+0085.
    private static func expression(_ pattern: String) throws -> NSRegularExpression {
        let same = pattern.replacingOccurrences(of: #"\s"#, with: #"\p{White_Space}"#)
            .replacingOccurrences(of: #"\S"#, with: #"\P{White_Space}"#)
        do {
            return try NSRegularExpression(pattern: same)
        } catch {
            throw PocketError("tokenizer.json: pattern \(pattern) is none that this system knows")
        }
    }

    /// The pieces in order; together they are the text.
    func pieces(_ text: String) -> [String] {
        cuts.reduce([text]) { pieces, cut in
            pieces.flatMap { piece in
                switch cut {
                case .matches(let pattern): return Self.isolate(piece, pattern)
                case .digits(let single): return Self.isolateDigits(piece, single)
                }
            }
        }
    }

    private static func isolate(_ text: String, _ pattern: NSRegularExpression) -> [String] {
        let whole = text as NSString
        var out: [String] = []
        var place = 0
        func give(_ start: Int, _ end: Int) {
            if end > start { out.append(whole.substring(with: NSRange(location: start, length: end - start))) }
        }
        for match in pattern.matches(in: text, range: NSRange(location: 0, length: whole.length)) {
            give(place, match.range.location)
            place = match.range.location + match.range.length
            give(match.range.location, place)
        }
        give(place, whole.length)
        return out
    }

    private static func isolateDigits(_ text: String, _ single: Bool) -> [String] {
        var out: [String.UnicodeScalarView] = []
        var wasDigit = false
        for scalar in text.unicodeScalars {
            let category = scalar.properties.generalCategory
            let isDigit = category == .decimalNumber || category == .letterNumber || category == .otherNumber
            if out.isEmpty || isDigit != wasDigit || (isDigit && single) { out.append(String.UnicodeScalarView()) }
            out[out.count - 1].append(scalar)
            wasDigit = isDigit
        }
        return out.map { String($0) }
    }
}
