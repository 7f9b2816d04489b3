// Answers lines of JSON on standard input with lines of JSON: what the Swift reader makes of pictures and texts.
import CoreML
import Foundation

@testable import PocketVLM

func answer(_ request: [String: Any]) async throws -> [String: Any] {
    switch request["what"] as? String {
    case "encode":
        let tokenizer = try Tokenizer(Data(contentsOf: URL(fileURLWithPath: request["tokenizer"] as! String)))
        let ids = try (request["texts"] as! [String]).map(tokenizer.encode)
        var pieces: [String] = []
        for row in ids {
            var detokenizer = Detokenizer()
            pieces.append(row.map { detokenizer.push(tokenizer.bytes($0)) }.joined() + detokenizer.flush())
        }
        return ["ids": ids, "texts": ids.map(tokenizer.decode), "streamed": pieces]
    case "prepare":
        let files = try BundleFiles(URL(fileURLWithPath: request["bundle"] as! String), verify: false)
        let session = try Session(files, engine: nil)
        let picture = try Picture(
            width: request["width"] as! Int, height: request["height"] as! Int, channels: request["channels"] as! Int,
            samples: Array(Data(contentsOf: URL(fileURLWithPath: request["samples"] as! String))),
            orientation: request["orientation"] as! Int, isFile: request["file"] as! Bool)
        let prepared = try session.prepare(picture)
        let ids = try session.promptIDs(request["question"] as! String, [prepared])
        var pixels = Data()
        for view in prepared.views {
            for value in view.pixels.floats {
                withUnsafeBytes(of: value.bitPattern.littleEndian) { pixels.append(contentsOf: $0) }
            }
        }
        try pixels.write(to: URL(fileURLWithPath: request["out"] as! String))
        let positions = try session.positions(ids, [prepared])
        return ["shapes": prepared.views.map(\.pixels.shape), "ids": ids, "positions": positions]
    case "open":
        let files = try BundleFiles(URL(fileURLWithPath: request["bundle"] as! String), verify: true)
        return ["name": files.manifest.name]
    case "ask":
        let files = try BundleFiles(URL(fileURLWithPath: request["bundle"] as! String), verify: false)
        let cache = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        let session = try Session(files, engine: await CoreMLEngine(files, cache: cache))
        let picture = try Picture(
            width: request["width"] as! Int, height: request["height"] as! Int, channels: 3,
            samples: Array(Data(contentsOf: URL(fileURLWithPath: request["samples"] as! String))), isFile: true)
        let most = request["tokens"] as! Int
        var pieces: [String] = []
        let first = try session.ask(request["question"] as! String, picture, maxNewTokens: most) {
            pieces.append($0)
            return true
        }
        var found: [String: Any] = [
            "text": first.text, "tokens": first.tokens, "finish": first.finish.rawValue, "pieces": pieces,
        ]
        if let further = request["further"] as? String {
            found["further"] = try session.askFurther(further, maxNewTokens: most).tokens
        }
        return found
    default:
        throw PocketError("probe: unknown request")
    }
}

while let line = readLine() {
    var found: [String: Any]
    do {
        found = try await answer(try JSONSerialization.jsonObject(with: Data(line.utf8)) as! [String: Any])
    } catch {
        found = ["error": "\(error)"]
    }
    let data = try JSONSerialization.data(withJSONObject: found)
    print(String(decoding: data, as: UTF8.self))
    fflush(stdout)
}
