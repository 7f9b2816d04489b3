/// The manifest's image section: the operations in their order. docs/bundle.md gives each to the rounding rule.
public struct ImageSpec {
    public enum Filter: String {
        case bilinear, bicubic, lanczos
    }

    public enum Alpha: String {
        case drop, white
    }

    public struct SmartResize {
        let factor, minPixels, maxPixels: Int
        let aspectLimit: Int?
        let atLeastFactor: Bool
        let filter: Filter
    }

    /// `tiles.grid@1`: how the whole view is made.
    public enum Whole {
        case exact(height: Int, width: Int, filter: Filter)
        case smart(SmartResize)
    }

    public struct LargePicture {
        let factor, least: Int
        let pixels: Double
    }

    public struct GridTiles {
        let height, width: Int
        let grids: [(rows: Int, columns: Int)]
        let only: LargePicture?
        let whole: Whole
        let wholeAfterTiles: Bool
        let filter: Filter
    }

    public enum Operation {
        case exifRotate
        case toRGB(fileAlpha: Alpha, pixelsAlpha: Alpha)
        case resizeLongestEdge(longestEdge: Int, cap: Int, filter: Filter)
        case resize(Whole)
        case splitTiles(side: Int, filter: Filter)
        case gridTiles(GridTiles)
        case normalise(subtract: [Float], divide: [Float])
        case toNCHW
        case toBytes
        case patchifyBlocks(patch: Int, merge: Int, frames: Int)
        case patchifyPadded(patch: Int, length: Int)
    }

    public let operations: [Operation]
    public let tokenPatch: Int
    public let tokenMerge: Int
    public let maxViews: Int
    public let maxTokens: Int

    /// What this reader carries out.
    static let known: Set<String> = [
        "exif_rotate@1", "to_rgb@1", "resize_longest_edge@1", "resize_exact@1", "smart_resize@1", "tiles.split@1",
        "tiles.grid@1", "normalise@1", "to_nchw@1", "to_bytes@1", "patchify.blocks@1", "patchify.padded@1",
        "tokens.grid@1",
    ]

    init(_ fields: Fields) throws {
        var fields = fields
        operations = try fields.list("operations").map(Self.operation)
        var tokens = try fields.fields("tokens")
        try Self.expect(tokens.string("op"), "tokens.grid@1", tokens.place)
        tokenPatch = try tokens.int("patch")
        tokenMerge = try tokens.int("merge")
        try tokens.finish()
        maxViews = try fields.int("max_views")
        maxTokens = try fields.int("max_tokens")
        try fields.finish()
    }

    static func expect(_ found: String, _ wanted: String, _ place: String) throws {
        if found != wanted {
            throw PocketError("\(place): operation \(found) is unknown to this reader; update the Swift package")
        }
    }

    private static func operation(_ given: Fields) throws -> Operation {
        var fields = given
        let name = try fields.string("op")
        let found: Operation
        switch name {
        case "exif_rotate@1":
            found = .exifRotate
        case "to_rgb@1":
            found = .toRGB(fileAlpha: try alpha(&fields, "file_alpha"), pixelsAlpha: try alpha(&fields, "pixels_alpha"))
        case "resize_longest_edge@1":
            let (edge, cap) = (try fields.int("longest_edge"), try fields.int("cap"))
            found = .resizeLongestEdge(longestEdge: edge, cap: cap, filter: try filter(&fields))
        case "resize_exact@1", "smart_resize@1":
            found = .resize(try whole(&fields, name))
        case "tiles.split@1":
            found = .splitTiles(side: try fields.int("side"), filter: try filter(&fields))
        case "tiles.grid@1":
            found = .gridTiles(try gridTiles(&fields))
        case "normalise@1":
            found = .normalise(subtract: try triple(&fields, "subtract"), divide: try triple(&fields, "divide"))
        case "to_nchw@1":
            found = .toNCHW
        case "to_bytes@1":
            found = .toBytes
        case "patchify.blocks@1":
            let (patch, merge) = (try fields.int("patch"), try fields.int("merge"))
            found = .patchifyBlocks(patch: patch, merge: merge, frames: try fields.int("frames"))
        case "patchify.padded@1":
            found = .patchifyPadded(patch: try fields.int("patch"), length: try fields.int("length"))
        default:
            throw PocketError("\(given.place): operation \(name) is unknown to this reader; update the Swift package")
        }
        try fields.finish()
        return found
    }

    private static func gridTiles(_ fields: inout Fields) throws -> GridTiles {
        let grids = try fields.array("grids").map { value -> (rows: Int, columns: Int) in
            guard case .array(let pair) = value, pair.count == 2 else { throw fields.wrong("grids", "pairs") }
            let sizes = try fields.integers(pair, "grids")
            return (sizes[0], sizes[1])
        }
        var only: LargePicture?
        if let value = fields.find("only") {
            var part = try Fields(value, "\(fields.place).only")
            only = LargePicture(
                factor: try part.int("factor"), least: try part.int("least"), pixels: try part.double("pixels"))
            try part.finish()
        }
        var part = try fields.fields("whole")
        let made = try whole(&part, part.string("op"))
        try part.finish()
        return GridTiles(
            height: try fields.int("height"), width: try fields.int("width"), grids: grids, only: only, whole: made,
            wholeAfterTiles: try fields.bool("whole_after_tiles", or: true), filter: try filter(&fields))
    }

    private static func whole(_ fields: inout Fields, _ name: String) throws -> Whole {
        if name == "resize_exact@1" {
            let (height, width) = (try fields.int("height"), try fields.int("width"))
            return .exact(height: height, width: width, filter: try filter(&fields))
        }
        try expect(name, "smart_resize@1", fields.place)
        var limit: Int?
        if let value = fields.find("aspect_limit") {
            guard case .int(let found) = value else { throw fields.wrong("aspect_limit", "an integer") }
            limit = found
        }
        return .smart(
            SmartResize(
                factor: try fields.int("factor"), minPixels: try fields.int("min_pixels"),
                maxPixels: try fields.int("max_pixels"), aspectLimit: limit,
                atLeastFactor: try fields.bool("at_least_factor", or: false), filter: try filter(&fields)))
    }

    private static func triple(_ fields: inout Fields, _ key: String) throws -> [Float] {
        let found = try fields.floats(key)
        guard found.count == 3 else { throw fields.wrong(key, "three numbers") }
        return found
    }

    private static func filter(_ fields: inout Fields) throws -> Filter {
        let name = try fields.string("filter")
        guard let found = Filter(rawValue: name) else { throw fields.wrong("filter", "a filter, not \(name)") }
        return found
    }

    private static func alpha(_ fields: inout Fields, _ key: String) throws -> Alpha {
        let name = try fields.string(key)
        guard let found = Alpha(rawValue: name) else { throw fields.wrong(key, "drop or white, not \(name)") }
        return found
    }
}
