import Foundation

/// Why an answer ended.
public enum Finish: String {
    case stop, length, context, cancelled
}

/// What an answer cost, in milliseconds.
public struct AnswerTimes {
    public var preprocessMs = 0.0
    public var encodeMs = 0.0
    public var prefillMs = 0.0
    /// From the picture's bytes to the first text.
    public var firstTextMs = 0.0
    public var decodeMs: [Double] = []
    public var endToEndMs = 0.0
    public var promptTokens = 0
    public var imageTokens = 0
}

public struct Answer {
    public let text: String
    public let tokens: [Int]
    public let finish: Finish
    public let times: AnswerTimes
}

/// A bundle ready to answer. One sequence at a time; not to be called from two threads at once.
public final class Session {
    public let files: BundleFiles
    public let tokenizer: Tokenizer
    private let engine: (any Engine)?
    private var sequence: RunningSequence?
    private var last: [Int] = []

    public var manifest: Manifest { files.manifest }

    /// `engine` nil: pictures and prompts only.
    public init(_ files: BundleFiles, engine: (any Engine)?) throws {
        self.files = files
        self.engine = engine
        tokenizer = try Tokenizer(files.data(files.manifest.tokenizer))
        sequence = try engine.map { try RunningSequence(files.manifest, $0) }
    }

    public func prepare(_ picture: Picture) throws -> PreparedImage {
        if picture.width * picture.height > manifest.sourcePixels {
            throw PocketError(
                "image: \(picture.width) x \(picture.height) pixels, the limit is \(manifest.sourcePixels); "
                    + "make it smaller")
        }
        return try PreparedImage(picture, manifest.image)
    }

    /// Ids of a conversation's first question.
    public func promptIDs(_ question: String, _ images: [PreparedImage]) throws -> [Int] {
        try manifest.prompt.first(question, images, tokenizer)
    }

    /// Rows of position ids of a whole sequence.
    public func positions(_ ids: [Int], _ images: [PreparedImage]) throws -> [[Int]] {
        let grids = images.flatMap { $0.views.map { (rows: $0.rows, columns: $0.columns) } }
        return try manifest.positions.of(ids, imageToken: manifest.prompt.imageToken, grids: grids, first: 0).0
    }

    /// Features of a picture, view after view.
    public func encode(_ image: PreparedImage) throws -> Features {
        let engine = try running().engine
        guard let function = manifest.stateful?.functions["vision_encoder"]?.first else {
            throw PocketError("manifest.json: names no function of vision_encoder; re-export")
        }
        let part = try manifest.part("vision_encoder")
        return try Features.joined(image.views.map { view in
            let inputs = try part.inputs.map { input -> (String, Tensor) in
                guard let found = view.inputs[input.name] else {
                    throw PocketError("vision_encoder: wants \(input.name), which no operation makes; re-export")
                }
                let fixed = input.shape.compactMap { $0 }
                if fixed.count == input.shape.count, fixed != found.shape {
                    throw PocketError(
                        "image: becomes \(input.name) \(found.shape), this bundle takes \(fixed) only; re-export")
                }
                return (input.name, found)
            }
            let made = try engine.run("vision_encoder", function: function, Dictionary(uniqueKeysWithValues: inputs))
            guard let tokens = made["image_features"], let hidden = tokens.shape.last else {
                throw PocketError("vision_encoder: gives no image_features; re-export")
            }
            let stack = try manifest.deepstack.map { deepstack -> Tensor in
                guard let found = made[deepstack.output] else {
                    throw PocketError("vision_encoder: gives no \(deepstack.output); re-export")
                }
                return Tensor(found.floats, [deepstack.layers, view.tokens, hidden])
            }
            return Features(
                tokens: Tensor(tokens.floats, [tokens.count / hidden, hidden]), deepstack: stack,
                grids: [(view.rows, view.columns)])
        })
    }

    /// Logits (vocabulary) after a prompt, in a new sequence.
    public func prefill(_ ids: [Int], _ images: [Features]) throws -> [Float] {
        let sequence = try running().sequence
        try sequence.begin()
        return try sequence.extend(ids, images)
    }

    /// The greedy answer to a first question. `onText` gets pieces as they come; it returns false to stop.
    ///
    /// Decoding the picture, if it is done in the argument, is part of the answer's times.
    public func ask(
        _ question: String, _ picture: @autoclosure () throws -> Picture?, maxNewTokens: Int = 256,
        onText: (String) -> Bool = { _ in true }
    ) throws -> Answer {
        try answer(picture, Wanted(tokens: maxNewTokens), onText) { try self.promptIDs(question, $0) }
    }

    /// As `ask`, but exactly so many tokens, whatever they are (the context permitting): to measure with.
    func askForTokens(
        _ question: String, _ picture: @autoclosure () throws -> Picture?, tokens: Int
    ) throws -> Answer {
        try answer(picture, Wanted(tokens: tokens, stops: false), { _ in true }) {
            try self.promptIDs(question, $0)
        }
    }

    /// The greedy answer to a further question, after `ask`; it goes on from the state.
    public func askFurther(
        _ question: String, _ picture: @autoclosure () throws -> Picture? = nil, maxNewTokens: Int = 256,
        onText: (String) -> Bool = { _ in true }
    ) throws -> Answer {
        guard try running().sequence.length > 0, let end = last.last else {
            throw PocketError("question: nothing was asked before; call ask first")
        }
        // the last id that was chosen has not been run yet: it goes first
        let ended = manifest.stopIDs.contains(end) ? end : nil
        return try answer(picture, Wanted(tokens: maxNewTokens), onText, after: end) {
            try self.manifest.prompt.further(question, $0, self.tokenizer, endedWith: ended)
        }
    }

    private func running() throws -> (engine: any Engine, sequence: RunningSequence) {
        guard let engine, let sequence else { throw PocketError("session: was opened without an engine") }
        return (engine, sequence)
    }

    private struct Wanted {
        var tokens: Int
        var stops = true
    }

    private func answer(
        _ picture: () throws -> Picture?, _ wanted: Wanted, _ onText: (String) -> Bool, after: Int? = nil,
        _ prompt: ([PreparedImage]) throws -> [Int]
    ) throws -> Answer {
        let sequence = try running().sequence
        var times = AnswerTimes()
        let start = Clock()
        let images = try picture().map { [try prepare($0)] } ?? []
        times.preprocessMs = start.ms
        let ids = try (after.map { [$0] } ?? []) + prompt(images)
        (times.promptTokens, times.imageTokens) = (ids.count, images.reduce(0) { $0 + $1.tokens })
        var clock = Clock()
        let features = try images.map(encode)
        times.encodeMs = features.isEmpty ? 0 : clock.ms
        clock = Clock()
        last = []  // a step that fails leaves a sequence that nothing can go on from
        if after == nil { try sequence.begin() }
        var logits = try sequence.extend(ids, features)
        times.prefillMs = clock.ms
        var (tokens, text, detokenizer) = ([Int](), "", Detokenizer())
        var finish: Finish?
        while finish == nil {
            let token = Self.largest(logits)
            tokens.append(token)
            if wanted.stops && manifest.stopIDs.contains(token) {
                finish = .stop
            } else if tokens.count >= wanted.tokens {
                finish = .length
            } else if sequence.length >= manifest.context {
                finish = .context
            }
            var piece = finish == .stop ? "" : detokenizer.push(tokenizer.bytes(token))
            if finish != nil { piece += detokenizer.flush() }
            if times.firstTextMs == 0 && (!piece.isEmpty || finish != nil) { times.firstTextMs = start.ms }
            text += piece
            if !piece.isEmpty && !onText(piece) { finish = finish ?? .cancelled }
            if finish == nil {
                clock = Clock()
                logits = try sequence.extend([token], [])
                times.decodeMs.append(clock.ms)
            }
        }
        times.endToEndMs = start.ms
        last = tokens
        return Answer(text: text, tokens: tokens, finish: finish!, times: times)
    }

    /// The index of the largest logit, the first of equal ones.
    static func largest(_ logits: [Float]) -> Int {
        var best = 0
        for (id, logit) in logits.enumerated() where logit > logits[best] { best = id }
        return best
    }
}

/// Milliseconds since it was made.
struct Clock {
    private let start = DispatchTime.now().uptimeNanoseconds

    var ms: Double { Double(DispatchTime.now().uptimeNanoseconds - start) / 1e6 }
}
