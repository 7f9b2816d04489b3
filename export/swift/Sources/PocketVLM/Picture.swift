/// A decoded picture: 8-bit samples as they are stored, alpha not multiplied in, no colour profile applied.
public struct Picture {
    public let width: Int
    public let height: Int
    /// 3 (red, green, blue) or 4 (and alpha); row after row.
    public let channels: Int
    public let samples: [UInt8]
    /// EXIF orientation, 1 to 8; looked at for files only.
    public let orientation: Int
    /// A file's bytes, not a camera frame or an image object: rotation and transparency differ.
    public let isFile: Bool

    public init(
        width: Int, height: Int, channels: Int, samples: [UInt8], orientation: Int = 1, isFile: Bool
    ) throws {
        guard width > 0, height > 0, channels == 3 || channels == 4, samples.count == width * height * channels else {
            throw PocketError("image: \(samples.count) samples do not make \(width) x \(height) x \(channels)")
        }
        self.width = width
        self.height = height
        self.channels = channels
        self.samples = samples
        self.orientation = orientation
        self.isFile = isFile
    }

    /// `exif_rotate@1`: upright by the orientation, for a file.
    func upright() throws -> Picture {
        guard isFile, (2...8).contains(orientation) else { return self }
        let turned = orientation >= 5
        let (rows, columns) = turned ? (width, height) : (height, width)
        var out = [UInt8]()
        out.reserveCapacity(samples.count)
        for y in 0..<rows {
            for x in 0..<columns {
                let (row, column) = source(x, y)
                let start = (row * width + column) * channels
                for channel in 0..<channels { out.append(samples[start + channel]) }
            }
        }
        return try Picture(width: columns, height: rows, channels: channels, samples: out, isFile: isFile)
    }

    /// Which stored (row, column) comes to column x of row y.
    private func source(_ x: Int, _ y: Int) -> (Int, Int) {
        let (right, bottom) = (width - 1, height - 1)
        switch orientation {
        case 2: return (y, right - x)
        case 3: return (bottom - y, right - x)
        case 4: return (bottom - y, x)
        case 5: return (x, y)
        case 6: return (bottom - x, y)
        case 7: return (bottom - x, right - y)
        default: return (x, right - y)
        }
    }

    /// `to_rgb@1`.
    func rgb(file: ImageSpec.Alpha, pixels: ImageSpec.Alpha) -> RGB {
        if channels == 3 { return RGB(height: height, width: width, bytes: samples) }
        let white = (isFile ? file : pixels) == .white
        var out = [UInt8]()
        out.reserveCapacity(width * height * 3)
        for pixel in stride(from: 0, to: samples.count, by: 4) {
            let alpha = Int(samples[pixel + 3])
            for channel in 0..<3 {
                let colour = Int(samples[pixel + channel])
                let t = (colour * alpha + 255 * (255 - alpha)) * 128 + 16384
                out.append(white ? UInt8((((t >> 8) + t) >> 8) >> 7) : UInt8(colour))
            }
        }
        return RGB(height: height, width: width, bytes: out)
    }
}
