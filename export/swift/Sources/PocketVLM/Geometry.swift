/// Sizes that the operations make of a picture's size. Every fraction is a double, in the order written.
enum Geometry {
    struct Size: Equatable {
        var height, width: Int
    }

    static func longestEdge(_ size: Size, _ longestEdge: Int, cap: Int) -> Size {
        var (height, width) = (size.height, size.width)
        var aspect = Double(width) / Double(height)
        if width >= height {
            width = longestEdge
            height = Int(Double(longestEdge) / aspect)
            height += height % 2
        } else {
            width = Int(Double(longestEdge) * aspect)
            height = longestEdge
            width += width % 2
        }
        (height, width) = (max(height, 1), max(width, 1))
        aspect = Double(width) / Double(height)
        if width >= height && width > cap {
            (width, height) = (cap, Int(Double(cap) / aspect))
        } else if height > width && height > cap {
            (width, height) = (Int(Double(cap) * aspect), cap)
        }
        return Size(height: max(height, 1), width: max(width, 1))
    }

    static func smart(_ size: Size, _ resize: ImageSpec.SmartResize) throws -> Size {
        let sides = [size.height, size.width]
        if let limit = resize.aspectLimit, max(sides[0], sides[1]) > limit * min(sides[0], sides[1]) {
            throw PocketError(
                "image: \(size.width) x \(size.height): one side is more than \(limit) times the other; crop it")
        }
        let factor = resize.factor
        let step = Double(factor)
        let least = resize.atLeastFactor ? factor : 0
        var rounded = sides.map { max(least, nearest(Double($0) / step) * factor) }
        let area = rounded[0] * rounded[1]
        let pixels = Double(size.height * size.width)
        if area > resize.maxPixels {
            let shrink = (pixels / Double(resize.maxPixels)).squareRoot()
            rounded = sides.map { max(factor, Int((Double($0) / shrink / step).rounded(.down)) * factor) }
        } else if area < resize.minPixels {
            let grow = (Double(resize.minPixels) / pixels).squareRoot()
            rounded = sides.map { Int((Double($0) * grow / step).rounded(.up)) * factor }
        }
        return Size(height: rounded[0], width: rounded[1])
    }

    static func resized(_ size: Size, _ resize: ImageSpec.Whole) throws -> Size {
        switch resize {
        case .exact(let height, let width, _): return Size(height: height, width: width)
        case .smart(let smartResize): return try smart(size, smartResize)
        }
    }

    /// `tiles.split@1`: the longer edge up to a multiple of `side`, the other after the aspect, then up.
    static func split(_ size: Size, side: Int) -> Size {
        let aspect = Double(size.width) / Double(size.height)
        if size.width >= size.height {
            let width = up(size.width, side)
            return Size(height: up(Int(Double(width) / aspect), side), width: width)
        }
        let height = up(size.height, side)
        return Size(height: height, width: up(Int(Double(height) * aspect), side))
    }

    /// `tiles.grid@1`: rows and columns of tiles (none: 0 x 0), and the size of the whole view, if there is one.
    static func grid(_ size: Size, _ tiles: ImageSpec.GridTiles) throws -> (rows: Int, columns: Int, whole: Size?) {
        let cut = tiles.only.map { isLarge(size, $0) } ?? true
        let grid = cut ? nearestGrid(size, tiles) : (rows: 1, columns: 1)
        let whole = try resized(size, tiles.whole)
        if grid.rows == 1 && grid.columns == 1 { return (0, 0, whole) }
        return (grid.rows, grid.columns, tiles.wholeAfterTiles ? whole : nil)
    }

    private static func isLarge(_ size: Size, _ test: ImageSpec.LargePicture) -> Bool {
        let rounded = [size.height, size.width].map {
            max(test.least, nearest(Double($0) / Double(test.factor)) * test.factor)
        }
        return Double(rounded[0] * rounded[1]) > test.pixels
    }

    private static func nearestGrid(_ size: Size, _ tiles: ImageSpec.GridTiles) -> (rows: Int, columns: Int) {
        let aspect = Double(size.width) / Double(size.height)
        var best = (rows: 1, columns: 1)
        var distance = Double.infinity
        for grid in tiles.grids {
            let found = abs(aspect - Double(grid.columns) / Double(grid.rows))
            let area = tiles.height * tiles.width * grid.rows * grid.columns
            if found < distance || (found == distance && 2 * size.height * size.width > area) {
                (best, distance) = (grid, found)
            }
        }
        return best
    }

    /// The nearest integer; a half goes to the even one.
    private static func nearest(_ value: Double) -> Int {
        Int(value.rounded(.toNearestOrEven))
    }

    private static func up(_ length: Int, _ side: Int) -> Int {
        (length + side - 1) / side * side
    }
}
