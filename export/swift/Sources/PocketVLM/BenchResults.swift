import Foundation

/// `pocketvlm.bench@1` as this package writes it; keys are written in snake_case. docs/bench.md is the contract.
public struct BenchResults: Encodable {
    struct Tool: Encodable {
        var name = "PocketVLM Swift"
        var version = "1"
    }

    struct Reason: Encodable {
        let what, why: String
    }

    struct Policy: Encodable {
        var rounds = 1
        let warmup, repeats, decodeTokens: Int
        var interleaved = false
    }

    struct GridPoint: Encodable {
        let id: String
        let image: String?
        let width, height: Int?
        let question: String
    }

    struct Load: Encodable {
        let coldMs: Double?
        let warmMs: [Double]
        let compileMs: Double?
        var pageCache = "unknown"
    }

    struct Times: Encodable {
        var preprocessMs: [Double] = []
        var encodeMs: [Double] = []
        var prefillMs: [Double] = []
        var ttftMs: [Double] = []
        var decodeMs: [[Double]] = []
        var endToEndMs: [Double] = []
    }

    struct Memory: Encodable {
        let meter: String
        let baseRssMib, loadedRssMib, peakRssMib: Double?
    }

    struct Disturbance: Encodable {
        let thermalStateAfter: String?
    }

    struct Run: Encodable {
        var round = 0
        var order = 0
        let started: String
        let freshProcess: Bool
        let load: Load
        let times: Times
        let memory: Memory?
        let disturbance: Disturbance
    }

    struct Sustained: Encodable {
        let askedS, measuredS: Double
        let tokensPerAnswer: Int
        let answerAtS, answerMs: [Double]
    }

    struct Point: Encodable {
        let point: String
        let promptTokens, imageTokens, decodeTokens: Int
        let runs: [Run]
        let sustained: Sustained?
    }

    struct Part: Encodable {
        let role: String
        let bytes: Int
        let bits: Double?
        let unit, unitNote: String?
    }

    struct Bundle: Encodable {
        let name, sha256, sourceSha256, format, precision: String
        let target: String?
        let parts: [Part]
        let stateBytes, maxContext: Int
        let points: [Point]
    }

    var schema = "pocketvlm.bench@1"
    let created: String
    var tool = Tool()
    var source = "swift"
    let emulated: Bool
    let emulatedWhy: String?
    let device: DeviceFacts
    let policy: Policy
    let grid: [GridPoint]
    let bundles: [Bundle]
    let missing: [Reason]

    public func write(to file: URL) throws {
        let encoder = JSONEncoder()
        encoder.keyEncodingStrategy = .convertToSnakeCase
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
        try encoder.encode(self).write(to: file, options: .atomic)
    }
}
