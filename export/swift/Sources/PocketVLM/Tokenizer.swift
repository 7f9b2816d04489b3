import Foundation

/// Text to ids and back, by a byte-level BPE in the file format of the tokenizers library.
public final class Tokenizer {
    private struct Pair: Hashable {
        let first, second: Int
    }

    private let added: [(bytes: [UInt8], id: Int, normalized: Bool)]
    private let special: Set<Int>
    private let vocabulary: [String: Int]
    private let texts: [Int: [UInt8]]
    private let byteIDs: [Int]
    private let merges: [Pair: (rank: Int, id: Int)]
    private let ignoresMerges, composes: Bool
    private let preTokenizer: PreTokenizer

    public init(_ data: Data) throws {
        let file = try TokenizerFile.read(data)
        preTokenizer = try PreTokenizer(file.pre_tokenizer)
        composes = try Self.composes(file.normalizer)
        ignoresMerges = file.model.ignore_merges ?? false
        let vocabulary = file.model.vocab
        self.vocabulary = vocabulary
        byteIDs = try ByteAlphabet.characters.map {
            guard let id = vocabulary[String($0)] else {
                throw PocketError("tokenizer.json: the vocabulary lacks the byte \($0)")
            }
            return id
        }
        var merges: [Pair: (rank: Int, id: Int)] = [:]
        merges.reserveCapacity(file.model.merges.count)
        for (rank, merge) in file.model.merges.enumerated() {
            guard let first = vocabulary[merge.first], let second = vocabulary[merge.second],
                let id = vocabulary[merge.first + merge.second]
            else { throw PocketError("tokenizer.json: merge \(rank) is of tokens that the vocabulary lacks") }
            merges[Pair(first: first, second: second)] = (rank, id)
        }
        self.merges = merges
        var texts: [Int: [UInt8]] = [:]
        texts.reserveCapacity(vocabulary.count)
        for (text, id) in vocabulary { texts[id] = ByteAlphabet.bytes(of: text) }
        for token in file.added_tokens { texts[token.id] = ByteAlphabet.bytes(of: token.content) }
        self.texts = texts
        special = Set(file.added_tokens.filter(\.special).map(\.id))
        // the longest first, so that it wins where two begin alike
        added = file.added_tokens.map { (Array($0.content.utf8), $0.id, $0.normalized) }
            .filter { !$0.0.isEmpty }.sorted { $0.0.count > $1.0.count }
    }

    private static func composes(_ step: TokenizerFile.Step?) throws -> Bool {
        guard let step else { return false }
        switch step.type {
        case "NFC": return true
        case "Sequence": return try (step.normalizers ?? []).map(composes).contains(true)
        default: throw PocketError("tokenizer.json: normalizer \(step.type) is unknown to this reader")
        }
    }

    /// Ids of a text: special tokens in it become themselves, none is added.
    public func encode(_ text: String) throws -> [Int] {
        var ids: [Int] = []
        for piece in split(Array(text.utf8), normalized: false) {
            guard case .text(let bytes) = piece else {
                ids.append(piece.id!)
                continue
            }
            let plain = String(decoding: bytes, as: UTF8.self)
            let composed = composes ? plain.precomposedStringWithCanonicalMapping : plain
            for inner in split(Array(composed.utf8), normalized: true) {
                guard case .text(let bytes) = inner else {
                    ids.append(inner.id!)
                    continue
                }
                for word in preTokenizer.pieces(String(decoding: bytes, as: UTF8.self)) { ids += encode(word: word) }
            }
        }
        return ids
    }

    /// The text of ids, special tokens left out.
    public func decode(_ ids: [Int]) -> String {
        String(decoding: ids.flatMap(bytes), as: UTF8.self)
    }

    /// What an id stands for; nothing for a special token.
    func bytes(_ id: Int) -> [UInt8] {
        special.contains(id) ? [] : texts[id] ?? []
    }

    private enum Piece {
        case text([UInt8])
        case token(Int)

        var id: Int? {
            if case .token(let id) = self { return id }
            return nil
        }
    }

    /// Added tokens and the text between them; `normalized`: which of them are looked for.
    private func split(_ text: [UInt8], normalized: Bool) -> [Piece] {
        let wanted = added.filter { $0.normalized == normalized }
        let starts = Set(wanted.map { $0.bytes[0] })
        var out: [Piece] = []
        var (held, place) = (0, 0)
        while place < text.count {
            let found =
                starts.contains(text[place]) ? wanted.first { text[place...].starts(with: $0.bytes) } : nil
            if let found {
                if place > held { out.append(.text(Array(text[held..<place]))) }
                out.append(.token(found.id))
                place += found.bytes.count
                held = place
            } else {
                place += 1
            }
        }
        if held < text.count { out.append(.text(Array(text[held...]))) }
        return out
    }

    /// Byte pairs, the one of lowest rank first, the leftmost of equal ones.
    private func encode(word: String) -> [Int] {
        let bytes = Array(word.utf8)
        if ignoresMerges {
            var text = String.UnicodeScalarView()
            text.append(contentsOf: bytes.map { ByteAlphabet.characters[Int($0)] })
            if let id = vocabulary[String(text)] { return [id] }
        }
        var ids = bytes.map { byteIDs[Int($0)] }
        while ids.count > 1 {
            var best: (rank: Int, id: Int, place: Int)?
            for place in 0..<ids.count - 1 {
                if let merge = merges[Pair(first: ids[place], second: ids[place + 1])],
                    merge.rank < best?.rank ?? Int.max
                {
                    best = (merge.rank, merge.id, place)
                }
            }
            guard let best else { break }
            ids[best.place] = best.id
            ids.remove(at: best.place + 1)
        }
        return ids
    }
}

/// Text of ids as they come, never half a character; all pieces joined are `decode` of all ids.
struct Detokenizer {
    private var held: [UInt8] = []

    mutating func push(_ bytes: [UInt8]) -> String {
        held += bytes
        let whole = held.count - Self.unfinished(held)
        let text = String(decoding: held[..<whole], as: UTF8.self)
        held.removeFirst(whole)
        return text
    }

    /// What is left at the end; an unfinished character is U+FFFD.
    mutating func flush() -> String {
        defer { held = [] }
        return String(decoding: held, as: UTF8.self)
    }

    /// How many bytes at the end may be the beginning of a character.
    private static func unfinished(_ bytes: [UInt8]) -> Int {
        for back in 1...4 where back <= bytes.count {
            let byte = bytes[bytes.count - back]
            if byte & 0b1100_0000 == 0b1000_0000 { continue }
            let length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1
            return length > back ? back : 0
        }
        return 0
    }
}
