import Foundation

/// Measures a bundle with one picture and question, and writes it down as `pocketvlm bench --import` reads it.
public struct Benchmark {
    /// How the session was opened; times in milliseconds, footprints in MiB.
    public struct Opening {
        public var coldMs: Double?
        public var warmMs: [Double] = []
        public var compileMs: Double?
        public var footprintBefore, footprintAfter: Double?
        /// Compute unit and a note by part.
        public var units: [String: (unit: String, note: String)] = [:]
        /// Whether the process was started for this.
        public var isFresh = true
        /// What runs the parts when it is not the device itself.
        public var emulatedWhy: String?

        public init() {}
    }

    public var warmup = 2
    public var repeats = 10
    public var decodeTokens = 32
    /// Ask again and again for so long afterwards; 0: not.
    public var sustainedSeconds = 0.0

    public init() {}

    /// The file is decoded by `load` inside of the measured time.
    public func run(
        _ session: Session, _ opening: Opening, picture file: URL, question: String, load: (URL) throws -> Picture
    ) async throws -> BenchResults {
        let facts = await DeviceFacts.read()
        let started = Self.now()
        let decoded = try load(file)
        let tokens = max(decodeTokens, 1)
        for _ in 0..<warmup { _ = try session.askForTokens(question, load(file), tokens: tokens) }
        var times = BenchResults.Times()
        var sizes = (prompt: 0, image: 0, decoded: Int.max)
        for _ in 0..<max(repeats, 1) {
            let answer = try session.askForTokens(question, load(file), tokens: tokens)
            Self.add(answer.times, to: &times)
            sizes = (answer.times.promptTokens, answer.times.imageTokens, min(sizes.decoded, answer.tokens.count))
        }
        let memory = DeviceFacts.footprint().map {
            BenchResults.Memory(
                meter: "phys_footprint", baseRssMib: opening.footprintBefore, loadedRssMib: opening.footprintAfter,
                peakRssMib: $0.most)
        }
        let run = BenchResults.Run(
            started: started, freshProcess: opening.isFresh,
            load: .init(coldMs: opening.coldMs, warmMs: opening.warmMs, compileMs: opening.compileMs), times: times,
            memory: memory, disturbance: .init(thermalStateAfter: DeviceFacts.thermalState()))
        let point = BenchResults.Point(
            point: "conformance", promptTokens: sizes.prompt, imageTokens: sizes.image, decodeTokens: sizes.decoded,
            runs: [run], sustained: try sustained(session, file, question, tokens, load))
        return BenchResults(
            created: Self.now(), emulated: opening.emulatedWhy != nil, emulatedWhy: opening.emulatedWhy, device: facts,
            policy: .init(warmup: warmup, repeats: max(repeats, 1), decodeTokens: tokens),
            grid: [
                .init(
                    id: point.point, image: file.lastPathComponent, width: decoded.width, height: decoded.height,
                    question: question)
            ],
            bundles: [try Self.bundle(session, opening, point)],
            missing: [.init(what: "energy", why: "the system gives an app no energy meter")])
    }

    private static func add(_ found: AnswerTimes, to times: inout BenchResults.Times) {
        times.preprocessMs.append(found.preprocessMs)
        times.encodeMs.append(found.encodeMs)
        times.prefillMs.append(found.prefillMs)
        times.ttftMs.append(found.firstTextMs)
        times.decodeMs.append(found.decodeMs)
        times.endToEndMs.append(found.endToEndMs)
    }

    private static func bundle(
        _ session: Session, _ opening: Opening, _ point: BenchResults.Point
    ) throws -> BenchResults.Bundle {
        let manifest = session.manifest
        let parts = manifest.parts.map { part in
            BenchResults.Part(
                role: part.role, bytes: part.bytes, bits: part.bits, unit: opening.units[part.role]?.unit,
                unitNote: opening.units[part.role]?.note)
        }
        return BenchResults.Bundle(
            name: manifest.name, sha256: try SHA256Hex.of(file: session.files.locate("manifest.json")),
            sourceSha256: manifest.sourceSHA256, format: manifest.format, precision: manifest.precision,
            target: manifest.target, parts: parts, stateBytes: manifest.states.reduce(0) { $0 + $1.bytes },
            maxContext: manifest.context, points: [point])
    }

    private func sustained(
        _ session: Session, _ file: URL, _ question: String, _ tokens: Int, _ load: (URL) throws -> Picture
    ) throws -> BenchResults.Sustained? {
        guard sustainedSeconds > 0 else { return nil }
        let clock = Clock()
        var (ends, lengths) = ([Double](), [Double]())
        while clock.ms < sustainedSeconds * 1000 {
            let answer = try session.askForTokens(question, load(file), tokens: tokens)
            ends.append(clock.ms / 1000)
            lengths.append(answer.times.endToEndMs)
        }
        return .init(
            askedS: sustainedSeconds, measuredS: clock.ms / 1000, tokensPerAnswer: tokens, answerAtS: ends,
            answerMs: lengths)
    }

    private static func now() -> String {
        ISO8601DateFormatter().string(from: Date())
    }
}
