import Foundation

/// `tokenizer.json` as the tokenizers library writes it. What this reader would not do as that library does is refused.
struct TokenizerFile: Decodable {
    struct Added: Decodable {
        let id: Int
        let content: String
        let special, normalized, lstrip, rstrip, single_word: Bool
    }

    struct Step: Decodable {
        struct Pattern: Decodable {
            let Regex: String?
        }

        let type: String
        let pretokenizers: [Step]?
        let normalizers: [Step]?
        let pattern: Pattern?
        let behavior: String?
        let invert: Bool?
        let individual_digits: Bool?
        let add_prefix_space: Bool?
        let use_regex: Bool?
    }

    /// Written as two texts or as one with a space between them.
    struct Merge: Decodable {
        let first, second: String

        init(from decoder: any Decoder) throws {
            let value = try decoder.singleValueContainer()
            let pair: [String]
            if let text = try? value.decode(String.self) {
                pair = text.split(separator: " ").map(String.init)
            } else {
                pair = try value.decode([String].self)
            }
            guard pair.count == 2 else {
                throw DecodingError.dataCorruptedError(in: value, debugDescription: "a merge has two parts")
            }
            (first, second) = (pair[0], pair[1])
        }
    }

    struct Model: Decodable {
        let type: String
        let vocab: [String: Int]
        let merges: [Merge]
        let dropout: Double?
        let unk_token: String?
        let continuing_subword_prefix: String?
        let end_of_word_suffix: String?
        let byte_fallback: Bool?
        let ignore_merges: Bool?
    }

    let added_tokens: [Added]
    let normalizer: Step?
    let pre_tokenizer: Step?
    let decoder: Step?
    let model: Model

    static func read(_ data: Data) throws -> TokenizerFile {
        let file: TokenizerFile
        do {
            file = try JSONDecoder().decode(TokenizerFile.self, from: data)
        } catch {
            throw PocketError("tokenizer.json: is no byte-level BPE (\(error))")
        }
        let model = file.model
        let plain = [model.continuing_subword_prefix, model.end_of_word_suffix].allSatisfy { $0 ?? "" == "" }
        guard model.type == "BPE", plain, model.dropout ?? 0 == 0, !(model.byte_fallback ?? false) else {
            throw PocketError("tokenizer.json: model \(model.type) with its settings is no plain byte-level BPE")
        }
        guard file.decoder?.type == "ByteLevel" else {
            throw PocketError("tokenizer.json: decoder \(file.decoder?.type ?? "none") is unknown to this reader")
        }
        for token in file.added_tokens where token.lstrip || token.rstrip || token.single_word {
            throw PocketError(
                "tokenizer.json: \(token.content) takes spaces or words around it, which this reader cannot do")
        }
        return file
    }
}

/// Bytes and the characters that stand for them in a byte-level vocabulary (GPT-2's table).
enum ByteAlphabet {
    static let characters: [Unicode.Scalar] = {
        let printable = Set(33...126).union(161...172).union(174...255)
        var next: UInt32 = 256
        return (0..<256).map { byte in
            if printable.contains(byte) { return Unicode.Scalar(UInt8(byte)) }
            defer { next += 1 }
            return Unicode.Scalar(next)!
        }
    }()

    static let bytes: [Unicode.Scalar: UInt8] = Dictionary(
        uniqueKeysWithValues: characters.enumerated().map { ($1, UInt8($0)) })

    /// The bytes that a token's text stands for; a text with another character is taken as it is.
    static func bytes(of token: String) -> [UInt8] {
        let found = token.unicodeScalars.compactMap { bytes[$0] }
        return found.count == token.unicodeScalars.count ? found : Array(token.utf8)
    }
}
