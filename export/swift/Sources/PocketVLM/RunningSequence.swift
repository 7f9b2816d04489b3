/// The sequence that the decoder's state holds: grows chunk by chunk, then token by token.
final class RunningSequence {
    private let manifest: Manifest
    private let stateful: Manifest.Stateful
    private let engine: any Engine
    private(set) var length = 0
    private var position = 0

    init(_ manifest: Manifest, _ engine: any Engine) throws {
        guard let stateful = manifest.stateful else {
            throw PocketError("manifest.json: format \(manifest.format), this session runs coreml; export for iphone")
        }
        self.manifest = manifest
        self.stateful = stateful
        self.engine = engine
    }

    /// A new sequence.
    func begin() throws {
        try engine.reset()
        (length, position) = (0, 0)
    }

    /// Appends ids with the features of the pictures among them; logits (vocabulary) of the last one.
    func extend(_ ids: [Int], _ images: [Features]) throws -> [Float] {
        if ids.isEmpty { throw PocketError("prompt: has no tokens; give one or more") }
        if length + ids.count > manifest.context {
            throw PocketError(
                "prompt: \(length + ids.count) tokens, the context holds \(manifest.context); ask for less")
        }
        let token = manifest.prompt.imageToken
        let slots = ids.indices.filter { ids[$0] == token }
        let features = images.isEmpty ? nil : try Features.joined(images)
        if slots.count != features?.tokens.shape[0] ?? 0 {
            throw PocketError("prompt: \(slots.count) image tokens, \(features?.tokens.shape[0] ?? 0) features")
        }
        let (rows, next) = try manifest.positions.of(
            ids, imageToken: token, grids: features?.grids ?? [], first: position)
        var nth = [Int: Int]()
        for (order, slot) in slots.enumerated() { nth[slot] = order }
        var logits: [Float] = []
        var place = 0
        while place < ids.count {
            let count = self.count(left: ids.count - place)
            let range = place..<place + count
            logits = try step(Array(ids[range]), rows.map { Array($0[range]) }, range.map { nth[$0] }, features)
            place += count
        }
        position = next
        return logits
    }

    /// How many of the tokens that are left go into the next run.
    private func count(left: Int) -> Int {
        // beyond the context there is no room for padding
        length + stateful.chunk <= stateful.context ? min(left, stateful.chunk) : 1
    }

    /// One run; `order`: which image feature each token takes, nil for text.
    private func step(_ ids: [Int], _ positions: [[Int]], _ order: [Int?], _ features: Features?) throws -> [Float] {
        let size = ids.count == 1 ? 1 : stateful.chunk
        let function = ids.count == 1 ? "decode" : "prefill"
        let padding = [Int](repeating: 0, count: size - ids.count)
        let embedded = try engine.run(
            "embed_tokens", function: function, ["input_ids": Tensor(ids + padding, [1, size])])
        guard let table = embedded["inputs_embeds"], let hidden = table.shape.last else {
            throw PocketError("embed_tokens: gives no inputs_embeds; re-export")
        }
        var values = table.floats
        for place in ids.count * hidden..<values.count { values[place] = 0 }
        var stack: [Float]?
        if let deepstack = manifest.deepstack {
            stack = [Float](repeating: 0, count: deepstack.layers * size * hidden)
        }
        for (slot, feature) in order.enumerated() {
            guard let feature, let features else { continue }
            copy(features.tokens, feature * hidden, hidden, &values, slot * hidden)
            guard let found = features.deepstack, stack != nil else { continue }
            for layer in 0..<found.shape[0] {
                let start = (layer * found.shape[1] + feature) * hidden
                copy(found, start, hidden, &stack!, (layer * size + slot) * hidden)
            }
        }
        let padded = positions.flatMap { $0 + padding }
        var inputs = [
            "inputs_embeds": Tensor(values, [1, size, hidden]),
            "position_ids": Tensor(padded, [positions.count, size]),
            "start": Tensor([length], [1]),
            "last": Tensor([ids.count - 1], [1]),
        ]
        if let deepstack = manifest.deepstack, let stack {
            inputs[deepstack.input] = Tensor(stack, [deepstack.layers, 1, size, hidden])
        }
        guard let logits = try engine.run("decoder", function: function, inputs)["logits"] else {
            throw PocketError("decoder: gives no logits; re-export")
        }
        length += ids.count
        return logits.floats
    }

    private func copy(_ from: Tensor, _ start: Int, _ count: Int, _ to: inout [Float], _ place: Int) {
        guard case .float(let values) = from.values else { return }
        to.replaceSubrange(place..<place + count, with: values[start..<start + count])
    }
}
