#if canImport(CoreML)
    import CoreML
    import XCTest

    @testable import PocketVLM

    /// Writes `bench.json` for `pocketvlm bench --import`. Run it in release, on the device, unplugged and cool.
    final class BenchmarkTests: XCTestCase {
        func testBenchmark() async throws {
            let files = try TestBundle.files()
            try XCTSkipIf(files.manifest.format != "coreml", "the bundle has no Core ML packages")
            var opening = Benchmark.Opening()
            opening.footprintBefore = DeviceFacts.footprint()?.now
            let cache = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
            defer { try? FileManager.default.removeItem(at: cache) }
            // an empty cache of compiled models: what a first start costs
            let first = try await CoreMLEngine(files, cache: cache)
            opening.compileMs = first.times.compileMs
            opening.coldMs = first.times.compileMs + first.times.loadMs
            opening.footprintAfter = DeviceFacts.footprint()?.now
            opening.warmMs = [try await CoreMLEngine(files, cache: cache).times.loadMs]
            opening.units = await ComputeUnits.planned(first, files.manifest).mapValues { ($0.unit, $0.note) }
            opening.emulatedWhy = environment("POCKETVLM_EMULATED_WHY")
            let session = try Session(files, engine: first)
            let subject = try Conformance(session).subject
            var benchmark = Benchmark()
            benchmark.repeats = environment("POCKETVLM_REPEATS").flatMap(Int.init) ?? 10
            benchmark.decodeTokens = environment("POCKETVLM_DECODE_TOKENS").flatMap(Int.init) ?? 32
            benchmark.sustainedSeconds = environment("POCKETVLM_SUSTAINED_S").flatMap(Double.init) ?? 0
            let results = try await benchmark.run(
                session, opening, picture: files.locate(subject.image), question: subject.question,
                load: TestBundle.load)
            try results.write(to: TestBundle.results)
            print("POCKETVLM_RESULTS \(TestBundle.results.path)")
            #if canImport(ObjectiveC)
                let attachment = XCTAttachment(contentsOfFile: TestBundle.results)
                attachment.name = "bench.json"
                attachment.lifetime = .keepAlways
                add(attachment)
            #endif
        }

        private func environment(_ name: String) -> String? {
            ProcessInfo.processInfo.environment[name]
        }
    }
#endif
