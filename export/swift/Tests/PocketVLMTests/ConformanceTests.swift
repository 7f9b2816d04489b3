import XCTest

@testable import PocketVLM

/// The bundle's own vectors: pixels, ids and positions, then logits through Core ML.
final class ConformanceTests: XCTestCase {
    func testPicturesAndPrompts() throws {
        let session = try Session(TestBundle.files(), engine: nil)
        let found = try Conformance(session).differences(withLogits: false, load: TestBundle.load)
        XCTAssertEqual(found, [])
    }

    #if canImport(CoreML)
        func testLogits() async throws {
            let files = try TestBundle.files()
            try XCTSkipIf(files.manifest.format != "coreml", "the bundle has no Core ML packages")
            let session = try Session(files, engine: await CoreMLEngine(files))
            let found = try Conformance(session).differences(withLogits: true, load: TestBundle.load)
            XCTAssertEqual(found, [])
        }
    #endif

    func testAnUnknownOperationIsNamed() throws {
        let files = try TestBundle.files()
        let text = try String(contentsOf: files.directory.appendingPathComponent("manifest.json"), encoding: .utf8)
        let copy = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID().uuidString).json")
        defer { try? FileManager.default.removeItem(at: copy) }
        try text.replacingOccurrences(of: "tokens.grid@1", with: "tokens.grid@9")
            .write(to: copy, atomically: true, encoding: .utf8)
        XCTAssertThrowsError(try Manifest(copy)) { XCTAssert("\($0)".contains("tokens.grid@9"), "\($0)") }
    }
}
