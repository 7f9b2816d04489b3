import Foundation
import XCTest

@testable import PocketVLM

#if canImport(CoreML)
    import CoreML
#endif

/// The bundle under test: POCKETVLM_BUNDLE, a folder `bundle` of the host app, or the one this package lies in.
enum TestBundle {
    static func files() throws -> BundleFiles {
        let given = ProcessInfo.processInfo.environment["POCKETVLM_BUNDLE"].map { URL(fileURLWithPath: $0) }
        let inApp = Bundle.main.url(forResource: "bundle", withExtension: nil)
        let package = URL(fileURLWithPath: #filePath)
            .deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()
        let directory = given ?? inApp ?? package.deletingLastPathComponent()
        guard FileManager.default.fileExists(atPath: directory.appendingPathComponent("manifest.json").path) else {
            throw XCTSkip("no bundle: set POCKETVLM_BUNDLE, or add a folder `bundle` to the app")
        }
        return try BundleFiles(directory, verify: true)
    }

    /// Apple's decoders; elsewhere a PAM file that a test put beside the picture.
    static func load(_ file: URL) throws -> Picture {
        #if canImport(ImageIO)
            return try Picture(file: file)
        #else
            return try pam(Data(contentsOf: file.appendingPathExtension("pam")))
        #endif
    }

    static var results: URL {
        let given = ProcessInfo.processInfo.environment["POCKETVLM_RESULTS"].map { URL(fileURLWithPath: $0) }
        let documents = FileManager.default.urls(for: .documentDirectory, in: .userDomainMask).first
        return given ?? (documents ?? FileManager.default.temporaryDirectory).appendingPathComponent("bench.json")
    }

    /// Netpbm's P7 with 3 or 4 channels; a comment `# orientation N` stands for the EXIF tag.
    private static func pam(_ data: Data) throws -> Picture {
        let end = data.range(of: Data("ENDHDR\n".utf8))!
        var facts: [String: Int] = ["orientation": 1]
        for line in String(decoding: data[..<end.lowerBound], as: UTF8.self).split(separator: "\n") {
            let words = line.split(separator: " ").filter { $0 != "#" }
            if words.count == 2 { facts[String(words[0])] = Int(words[1]) }
        }
        return try Picture(
            width: facts["WIDTH"]!, height: facts["HEIGHT"]!, channels: facts["DEPTH"]!,
            samples: Array(data[end.upperBound...]), orientation: facts["orientation"]!, isFile: true)
    }
}
