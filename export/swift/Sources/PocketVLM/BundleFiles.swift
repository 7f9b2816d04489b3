import Foundation

#if canImport(CryptoKit)
    import CryptoKit
#endif

/// A bundle on disk: its manifest, and files that are what the manifest says.
public struct BundleFiles {
    public let directory: URL
    public let manifest: Manifest

    /// `verify`: hash every file that the manifest names (once after a download; it reads all weights).
    public init(_ directory: URL, verify: Bool) throws {
        self.directory = directory
        manifest = try Manifest(directory.appendingPathComponent("manifest.json"))
        guard verify else { return }
        for part in manifest.parts { try check(part.path, part.sha256) }
        for file in [manifest.tokenizer, manifest.conformance] { try check(file.path, file.sha256) }
    }

    /// A file of the bundle; one that a symbolic link leads out of is refused.
    public func locate(_ path: String) throws -> URL {
        let inside = directory.resolvingSymlinksInPath().path
        let found = directory.appendingPathComponent(path).resolvingSymlinksInPath()
        if !found.path.hasPrefix(inside + "/") {
            throw PocketError("\(path): leads out of the bundle; copy the file in")
        }
        return found
    }

    /// The bytes of a file whose hash is known.
    func data(_ file: Manifest.File) throws -> Data {
        guard let found = try? Data(contentsOf: locate(file.path)) else {
            throw PocketError("\(file.path): cannot be read; copy the bundle again")
        }
        let hash = SHA256Hex.of(found)
        if hash != file.sha256 { throw wrong(file.path, hash, file.sha256) }
        return found
    }

    /// Hash of a file; of a directory, of its sorted `HASH  RELATIVE/PATH` lines.
    private func check(_ path: String, _ wanted: String) throws {
        let url = try locate(path)
        var isDirectory: ObjCBool = false
        guard FileManager.default.fileExists(atPath: url.path, isDirectory: &isDirectory) else {
            throw PocketError("\(path): is not there; copy the bundle again")
        }
        let found = isDirectory.boolValue ? try Self.directoryHash(url) : try SHA256Hex.of(file: url)
        if found != wanted { throw wrong(path, found, wanted) }
    }

    private static func directoryHash(_ directory: URL) throws -> String {
        let root = directory.resolvingSymlinksInPath().path
        var files: [String] = []
        for case let url as URL in FileManager.default.enumerator(
            at: directory, includingPropertiesForKeys: [.isDirectoryKey])!
        {
            let isDirectory = try url.resourceValues(forKeys: [.isDirectoryKey]).isDirectory ?? false
            if !isDirectory {
                files.append(String(url.resolvingSymlinksInPath().path.dropFirst(root.count + 1)))
            }
        }
        // by bytes: a String of Swift has another order
        files.sort { $0.utf8.lexicographicallyPrecedes($1.utf8) }
        let lines = try files.map {
            "\(try SHA256Hex.of(file: directory.appendingPathComponent($0)))  \($0)\n"
        }
        return SHA256Hex.of(Data(lines.joined().utf8))
    }

    private func wrong(_ path: String, _ found: String, _ wanted: String) -> PocketError {
        PocketError("\(path): sha256 \(found.prefix(8)).., manifest says \(wanted.prefix(8))..; copy the bundle again")
    }
}

/// SHA-256 in hexadecimal.
public enum SHA256Hex {
    public static func of(_ data: Data) -> String {
        #if canImport(CryptoKit)
            var hash = SHA256()
        #else
            var hash = PlainSHA256()
        #endif
        hash.update(data: data)
        return hash.finalize().map { byte in (byte < 16 ? "0" : "") + String(byte, radix: 16) }.joined()
    }

    public static func of(file: URL) throws -> String {
        guard let data = try? Data(contentsOf: file, options: .alwaysMapped) else {
            throw PocketError("\(file.lastPathComponent): cannot be read")
        }
        return of(data)
    }
}
