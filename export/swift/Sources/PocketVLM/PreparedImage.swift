/// One run of the vision part: its inputs by name, and the rows and columns of image tokens it becomes.
public struct View {
    public let inputs: [String: Tensor]
    public let rows: Int
    public let columns: Int

    public var tokens: Int { rows * columns }

    /// What the pixels became, to be compared.
    public var pixels: Tensor { inputs["pixel_values"] ?? inputs["pixel_bytes"]! }
}

/// The views of one picture, by the manifest's operations.
public struct PreparedImage {
    public let views: [View]
    /// Rows and columns of the views that are tiles; 0 x 0 without any.
    public let tileRows: Int
    public let tileColumns: Int

    public var tokens: Int { views.reduce(0) { $0 + $1.tokens } }

    init(_ picture: Picture, _ spec: ImageSpec) throws {
        var picture = picture
        var value: RGB?
        var cut: (views: [RGB], rows: Int, columns: Int)?
        var normalise: (subtract: [Float], divide: [Float])?
        var inputs: [[String: Tensor]] = []
        for operation in spec.operations {
            let views = cut?.views ?? value.map { [$0] } ?? []
            switch operation {
            case .exifRotate:
                picture = try picture.upright()
            case .toRGB(let file, let pixels):
                value = picture.rgb(file: file, pixels: pixels)
            case .resizeLongestEdge(let edge, let cap, let filter):
                let from = try Self.only(views)
                value = Resample.resize(from, to: Geometry.longestEdge(from.size, edge, cap: cap), filter)
            case .resize(let whole):
                value = try Self.resized(Self.only(views), whole, Layouts.padded(spec))
            case .splitTiles(let side, let filter):
                cut = Self.split(try Self.only(views), side, filter)
            case .gridTiles(let tiles):
                cut = try Self.grid(Self.only(views), tiles, Layouts.padded(spec))
            case .normalise(let subtract, let divide):
                normalise = (subtract, divide)
            case .toBytes:
                inputs = views.map { ["pixel_bytes": Tensor($0.bytes, [$0.height, $0.width, 3])] }
            case .toNCHW, .patchifyBlocks, .patchifyPadded:
                guard let normalise else { throw PocketError("image.operations: no normalise@1; re-export") }
                inputs = try views.map { try Layouts.inputs(of: $0, normalise, operation) }
            }
        }
        let sizes = cut?.views ?? value.map { [$0] } ?? []
        guard !inputs.isEmpty, inputs.count == sizes.count else {
            throw PocketError("image.operations: end with no layout; re-export")
        }
        self.views = zip(sizes, inputs).map { pixels, found in
            View(
                inputs: found, rows: Self.tokens(pixels.height, spec), columns: Self.tokens(pixels.width, spec))
        }
        (tileRows, tileColumns) = (cut?.rows ?? 0, cut?.columns ?? 0)
    }

    /// `tokens.grid@1` of one side.
    private static func tokens(_ side: Int, _ spec: ImageSpec) -> Int {
        (side / spec.tokenPatch + spec.tokenMerge - 1) / spec.tokenMerge
    }

    private static func only(_ views: [RGB]) throws -> RGB {
        guard views.count == 1 else { throw PocketError("image.operations: are in no possible order; re-export") }
        return views[0]
    }

    private static func resized(_ picture: RGB, _ whole: ImageSpec.Whole, _ padded: Layouts.Padded?) throws -> RGB {
        let size = try Geometry.resized(picture.size, whole)
        try padded?.refuseNeedle(size)
        return Resample.resize(picture, to: size, filter(whole))
    }

    private static func filter(_ whole: ImageSpec.Whole) -> ImageSpec.Filter {
        switch whole {
        case .exact(_, _, let filter): return filter
        case .smart(let resize): return resize.filter
        }
    }

    private static func split(_ picture: RGB, _ side: Int, _ filter: ImageSpec.Filter) -> ([RGB], Int, Int) {
        let stretched = Resample.resize(picture, to: Geometry.split(picture.size, side: side), filter)
        let square = Geometry.Size(height: side, width: side)
        if stretched.size == square { return ([stretched], 0, 0) }
        let (rows, columns) = (stretched.height / side, stretched.width / side)
        return (pieces(stretched, rows, columns) + [Resample.resize(stretched, to: square, filter)], rows, columns)
    }

    private static func grid(
        _ picture: RGB, _ tiles: ImageSpec.GridTiles, _ padded: Layouts.Padded?
    ) throws -> ([RGB], Int, Int) {
        let plan = try Geometry.grid(picture.size, tiles)
        if let whole = plan.whole { try padded?.refuseNeedle(whole) }
        var views: [RGB] = []
        if plan.rows * plan.columns > 0 {
            let size = Geometry.Size(height: tiles.height * plan.rows, width: tiles.width * plan.columns)
            views = pieces(Resample.resize(picture, to: size, tiles.filter), plan.rows, plan.columns)
        }
        if let whole = plan.whole { views.append(Resample.resize(picture, to: whole, filter(tiles.whole))) }
        return (views, plan.rows, plan.columns)
    }

    private static func pieces(_ picture: RGB, _ rows: Int, _ columns: Int) -> [RGB] {
        let (height, width) = (picture.height / rows, picture.width / columns)
        return (0..<rows).flatMap { row in
            (0..<columns).map {
                picture.crop(top: row * height, left: $0 * width, height: height, width: width)
            }
        }
    }
}
