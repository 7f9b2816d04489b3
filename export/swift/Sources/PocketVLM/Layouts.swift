/// A view's pixels in the layout that the vision part wants.
enum Layouts {
    /// `patchify.padded@1`, whose views must not have more than `length` patches.
    struct Padded {
        let patch, length: Int

        func refuseNeedle(_ size: Geometry.Size) throws {
            let (rows, columns) = (size.height / patch, size.width / patch)
            if rows * columns > length {
                throw PocketError(
                    "image: is too long and thin: \(columns) x \(rows) patches, the most is \(length); crop it")
            }
        }
    }

    static func padded(_ spec: ImageSpec) -> Padded? {
        guard case .patchifyPadded(let patch, let length)? = spec.operations.last else { return nil }
        return Padded(patch: patch, length: length)
    }

    static func inputs(
        of pixels: RGB, _ normalise: (subtract: [Float], divide: [Float]), _ layout: ImageSpec.Operation
    ) throws -> [String: Tensor] {
        let table = (0..<3).map { channel in
            (0..<256).map { (Float($0) - normalise.subtract[channel]) / normalise.divide[channel] }
        }
        switch layout {
        case .patchifyBlocks(let patch, let merge, let frames):
            return try blocks(pixels, table, patch: patch, merge: merge, frames: frames)
        case .patchifyPadded(let patch, let length):
            return try padded(pixels, table, Padded(patch: patch, length: length))
        default:
            return ["pixel_values": nchw(pixels, table)]
        }
    }

    /// `to_nchw@1`: (1, 3, height, width).
    private static func nchw(_ pixels: RGB, _ table: [[Float]]) -> Tensor {
        let plane = pixels.height * pixels.width
        var values = [Float](repeating: 0, count: 3 * plane)
        for channel in 0..<3 {
            for i in 0..<plane { values[channel * plane + i] = table[channel][Int(pixels.bytes[i * 3 + channel])] }
        }
        return Tensor(values, [1, 3, pixels.height, pixels.width])
    }

    /// `patchify.blocks@1`: blocks in reading order, a block's patches in reading order; each channel, frame, row.
    private static func blocks(
        _ pixels: RGB, _ table: [[Float]], patch: Int, merge: Int, frames: Int
    ) throws -> [String: Tensor] {
        let (rows, columns) = try grid(pixels, patch * merge)
        let length = 3 * frames * patch * patch
        var values = [Float]()
        values.reserveCapacity(rows * columns * merge * merge * length)
        for block in 0..<rows * columns {
            for inner in 0..<merge * merge {
                let top = (block / columns * merge + inner / merge) * patch
                let left = (block % columns * merge + inner % merge) * patch
                for channel in 0..<3 {
                    for _ in 0..<frames {
                        for y in top..<top + patch {
                            for x in left..<left + patch {
                                values.append(table[channel][Int(pixels.bytes[(y * pixels.width + x) * 3 + channel])])
                            }
                        }
                    }
                }
            }
        }
        return [
            "pixel_values": Tensor(values, [rows * columns * merge * merge, length]),
            "image_grid_thw": Tensor([1, rows * merge, columns * merge], [1, 3]),
        ]
    }

    /// `patchify.padded@1`: patches in reading order, each row, column, channel; zeros up to `length`.
    private static func padded(_ pixels: RGB, _ table: [[Float]], _ layout: Padded) throws -> [String: Tensor] {
        let patch = layout.patch
        let (rows, columns) = try grid(pixels, patch)
        try layout.refuseNeedle(pixels.size)
        let size = patch * patch * 3
        var values = [Float]()
        values.reserveCapacity(layout.length * size)
        for place in 0..<rows * columns {
            let (top, left) = (place / columns * patch, place % columns * patch)
            for y in top..<top + patch {
                for x in left..<left + patch {
                    for channel in 0..<3 {
                        values.append(table[channel][Int(pixels.bytes[(y * pixels.width + x) * 3 + channel])])
                    }
                }
            }
        }
        values += [Float](repeating: 0, count: (layout.length - rows * columns) * size)
        let mask = (0..<layout.length).map { $0 < rows * columns ? 1 : 0 }
        return [
            "pixel_values": Tensor(values, [1, layout.length, size]),
            "pixel_attention_mask": Tensor(mask, [1, layout.length]),
            "spatial_shapes": Tensor([rows, columns], [1, 2]),
        ]
    }

    private static func grid(_ pixels: RGB, _ step: Int) throws -> (Int, Int) {
        if pixels.height % step != 0 || pixels.width % step != 0 {
            throw PocketError(
                "image.operations: give \(pixels.width) x \(pixels.height) pixels, which no patches of \(step) fill; "
                    + "re-export")
        }
        return (pixels.height / step, pixels.width / step)
    }
}
