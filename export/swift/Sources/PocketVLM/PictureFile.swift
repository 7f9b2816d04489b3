#if canImport(ImageIO)
    import CoreGraphics
    import Foundation
    import ImageIO

    extension Picture {
        /// A picture file (PNG, JPEG, HEIC, WebP): the first frame, with its EXIF orientation.
        ///
        /// Nothing is drawn: drawing would multiply alpha in and apply the colour profile.
        public init(file: URL, maxPixels: Int = 100_000_000) throws {
            let name = file.lastPathComponent
            guard let source = CGImageSourceCreateWithURL(file as CFURL, nil),
                let facts = CGImageSourceCopyPropertiesAtIndex(source, 0, nil) as? [CFString: Any],
                let width = facts[kCGImagePropertyPixelWidth] as? Int,
                let height = facts[kCGImagePropertyPixelHeight] as? Int
            else { throw PocketError("\(name): is not an image that can be read; give a PNG, JPEG or HEIC file") }
            if width * height > maxPixels {
                throw PocketError("\(name): \(width) x \(height) pixels, the limit is \(maxPixels); make it smaller")
            }
            guard let image = CGImageSourceCreateImageAtIndex(source, 0, nil) else {
                throw PocketError("\(name): the image is truncated or damaged; save it again")
            }
            let orientation = facts[kCGImagePropertyOrientation] as? Int ?? 1
            try self.init(image, orientation: orientation, isFile: true, name: name)
        }

        /// An image object or a camera frame; `isFile` false: neither turned nor treated as a file.
        public init(_ image: CGImage, orientation: Int = 1, isFile: Bool = false, name: String = "image") throws {
            let layout = try SampleLayout(image, name)
            guard let data = image.dataProvider?.data as Data? else {
                throw PocketError("\(name): gives no samples; save it as a PNG")
            }
            var samples = [UInt8]()
            samples.reserveCapacity(image.width * image.height * layout.channels)
            data.withUnsafeBytes { bytes in
                for row in 0..<image.height {
                    for column in 0..<image.width {
                        layout.append(bytes, row * image.bytesPerRow + column * layout.pixelBytes, &samples)
                    }
                }
            }
            try self.init(
                width: image.width, height: image.height, channels: layout.channels, samples: samples,
                orientation: orientation, isFile: isFile)
        }
    }

    /// Where the samples of a pixel are in a decoded image; 16-bit ones are taken by their high byte.
    private struct SampleLayout {
        let pixelBytes: Int
        private let colours: [Int]
        private let alpha: Int?
        private let isPremultiplied: Bool
        private let palette: [UInt8]?

        var channels: Int { alpha == nil ? 3 : 4 }

        init(_ image: CGImage, _ name: String) throws {
            let sample = image.bitsPerComponent / 8
            pixelBytes = image.bitsPerPixel / 8
            let model = image.colorSpace?.model
            let isFloat = image.bitmapInfo.contains(.floatComponents)
            guard [1, 2].contains(sample), image.bitsPerComponent % 8 == 0, !isFloat,
                model == .rgb || model == .monochrome || model == .indexed
            else { throw PocketError("\(name): has samples that this reader does not know; save it as an 8-bit PNG") }
            let info = image.alphaInfo
            isPremultiplied = info == .premultipliedFirst || info == .premultipliedLast
            let isFirst = info == .first || info == .premultipliedFirst || info == .noneSkipFirst
            let hasAlpha = isPremultiplied || info == .first || info == .last
            let count = model == .rgb ? 3 : 1
            let order = image.byteOrderInfo
            let isSwapped = order == .order32Little
            // the place of a sample among those of the pixel; 32-bit little-endian pixels are stored backwards
            func place(_ index: Int) -> Int {
                let stored = isSwapped ? pixelBytes / sample - 1 - index : index
                return stored * sample + (sample == 2 && order == .order16Little ? 1 : 0)
            }
            let first = isFirst ? 1 : 0
            colours = (0..<3).map { place(first + (count == 3 ? $0 : 0)) }
            alpha = hasAlpha ? place(isFirst ? 0 : count) : nil
            palette = model == .indexed ? image.colorSpace?.colorTable : nil
            if model == .indexed && palette == nil {
                throw PocketError("\(name): has a palette that cannot be read; save it as an RGB PNG")
            }
        }

        func append(_ bytes: UnsafeRawBufferPointer, _ start: Int, _ out: inout [UInt8]) {
            if let palette {
                let index = Int(bytes[start]) * 3
                for channel in 0..<3 { out.append(palette[index + channel]) }
            } else {
                let opacity = alpha.map { Int(bytes[start + $0]) } ?? 255
                for offset in colours {
                    let stored = Int(bytes[start + offset])
                    let isScaled = isPremultiplied && opacity > 0 && opacity < 255
                    out.append(UInt8(isScaled ? min((stored * 255 + opacity / 2) / opacity, 255) : stored))
                }
            }
            if let alpha { out.append(bytes[start + alpha]) }
        }
    }
#endif
