import Foundation

/// `manifest.json`: what this reader needs of it. docs/bundle.md is the contract.
public struct Manifest {
    public struct Input {
        let name, dtype: String
        let shape: [Int?]
    }

    public struct Part {
        public let role, path, sha256: String
        public let bytes: Int
        let inputs, outputs: [Input]
        /// Mean bits of a stored parameter.
        public let bits: Double?
    }

    public struct File {
        let path, sha256: String
    }

    public struct Deepstack {
        let layers: Int
        let output, input: String
    }

    public struct State {
        let name: String
        let isRewindable: Bool
        let bytes: Int
    }

    /// `cache.stateful@1`: both functions and how long their state is.
    public struct Stateful {
        let chunk, context: Int
        let functions: [String: [String]]
    }

    public let name, format, precision: String
    public let target: String?
    public let image: ImageSpec
    public let prompt: PromptSpec
    public let positions: Positions
    public let deepstack: Deepstack?
    public let stateful: Stateful?
    public let states: [State]
    public let context, sourcePixels: Int
    public let tokenizer: File
    public let stopIDs: Set<Int>
    public let parts: [Part]
    public let conformance: File
    public let sourceSHA256: String

    /// Every operation that this reader carries out.
    static let known: Set<String> = ImageSpec.known.union([
        "replace_tokens@1", "deepstack.add@1", "positions.1d@1", "positions.mrope@1", "attention.causal@1",
        "cache.stateful@1",
    ])

    public init(_ file: URL) throws {
        var fields = try Fields(JSON.read(file), "manifest.json")
        if try fields.int("manifest_version") != 1 { throw fields.wrong("manifest_version", "1") }
        for operation in try fields.strings("requires") where !Self.known.contains(operation) {
            throw PocketError(
                "manifest.json: needs the operation \(operation), unknown to this reader; update the Swift package")
        }
        name = try fields.string("name")
        format = try fields.string("format")
        precision = try fields.string("precision")
        if case .string(let found)? = fields.find("target") { target = found } else { target = nil }
        image = try ImageSpec(fields.fields("image"))
        prompt = try PromptSpec(fields.fields("prompt"))
        var merge = try fields.fields("merge")
        try ImageSpec.expect(merge.string("op"), "replace_tokens@1", merge.place)
        if try merge.int("token") != prompt.imageToken { throw merge.wrong("token", "\(prompt.imageToken)") }
        try merge.finish()
        deepstack = try fields.find("deepstack").map { try Self.deepstack(Fields($0, "manifest.json.deepstack")) }
        positions = try Self.positions(fields.fields("positions"))
        var attention = try fields.fields("attention")
        try ImageSpec.expect(attention.string("op"), "attention.causal@1", attention.place)
        try attention.finish()
        stateful = try fields.find("coreml").map { try Self.stateful(Fields($0, "manifest.json.coreml")) }
        states = try fields.list("state").map(Self.state)
        var limits = try fields.fields("limits")
        context = try limits.int("context")
        sourcePixels = try limits.int("source_pixels")
        limits.skip("image_tokens", "images")
        try limits.finish()
        var text = try fields.fields("tokenizer")
        try ImageSpec.expect(text.string("type"), "tokenizers-json", text.place)
        stopIDs = Set(try text.ints("stop_ids"))
        tokenizer = try Self.file(text.fields("file"))
        try text.finish()
        parts = try fields.list("parts").map(Self.part)
        conformance = try Self.file(fields.fields("conformance"))
        var source = try fields.fields("source")
        sourceSHA256 = try source.string("sha256")
        fields.skip("flavour", "providers", "static", "tool_versions", "parity", "notes")
        try fields.finish()
    }

    public func part(_ role: String) throws -> Part {
        guard let found = parts.first(where: { $0.role == role }) else {
            throw PocketError("manifest.json: has no part \(role); re-export")
        }
        return found
    }

    static func file(_ given: Fields) throws -> File {
        var fields = given
        let found = File(path: try confined(fields.string("path"), given.place), sha256: try fields.string("sha256"))
        fields.skip("bytes")
        try fields.finish()
        return found
    }

    /// A path that stays inside of the bundle, as it is written.
    private static func confined(_ path: String, _ place: String) throws -> String {
        let parts = path.split(separator: "/", omittingEmptySubsequences: false)
        if path.contains("\\") || path.contains(":") || parts.contains(where: { ["", ".", ".."].contains($0) }) {
            throw PocketError("\(place): path \(path) must be relative and stay inside the bundle")
        }
        return path
    }

    private static func deepstack(_ given: Fields) throws -> Deepstack {
        var fields = given
        try ImageSpec.expect(fields.string("op"), "deepstack.add@1", fields.place)
        let (output, input) = (try fields.string("output"), try fields.string("input"))
        let found = Deepstack(layers: try fields.int("layers"), output: output, input: input)
        try fields.finish()
        return found
    }

    private static func positions(_ given: Fields) throws -> Positions {
        var fields = given
        let name = try fields.string("op")
        fields.skip("sections", "interleaved")
        try fields.finish()
        if name == "positions.1d@1" { return .line }
        try ImageSpec.expect(name, "positions.mrope@1", given.place)
        return .mrope
    }

    private static func stateful(_ given: Fields) throws -> Stateful {
        var fields = given
        try ImageSpec.expect(fields.string("op"), "cache.stateful@1", fields.place)
        var named = try fields.fields("functions")
        var functions: [String: [String]] = [:]
        for role in ["vision_encoder", "embed_tokens", "decoder"] { functions[role] = try named.strings(role) }
        try named.finish()
        fields.skip("deployment_target")
        let found = Stateful(
            chunk: try fields.int("chunk"), context: try fields.int("context"), functions: functions)
        try fields.finish()
        return found
    }

    private static func state(_ given: Fields) throws -> State {
        var fields = given
        let item = ["float16": 2, "int8": 1][try fields.string("dtype")] ?? 4
        let sizes = try fields.array("shape").map { size -> Int in
            if case .int(let found) = size { return found }
            return 1
        }
        let isRewindable = try fields.bool("rewindable")
        let name = try fields.string("input")
        fields.skip("kind", "output", "sequence_axis", "in_place", "padding_side")
        try fields.finish()
        return State(name: name, isRewindable: isRewindable, bytes: sizes.reduce(item, *))
    }

    private static func part(_ given: Fields) throws -> Part {
        var fields = given
        var (bits, parameters) = (0.0, 0.0)
        for var row in try fields.list("bits") {
            let count = try row.double("parameters")
            bits += try row.double("bits") * count
            parameters += count
        }
        let (inputs, outputs) = (try fields.list("inputs").map(input), try fields.list("outputs").map(input))
        let path = try confined(fields.string("path"), given.place)
        let found = Part(
            role: try fields.string("role"), path: path, sha256: try fields.string("sha256"),
            bytes: try fields.int("bytes"), inputs: inputs, outputs: outputs,
            bits: parameters > 0 ? bits / parameters : nil)
        fields.skip("fallbacks", "onnx", "data")
        try fields.finish()
        return found
    }

    private static func input(_ given: Fields) throws -> Input {
        var fields = given
        let shape = try fields.array("shape").map { size -> Int? in
            if case .int(let found) = size { return found }
            return nil
        }
        let found = Input(name: try fields.string("name"), dtype: try fields.string("dtype"), shape: shape)
        try fields.finish()
        return found
    }
}
