import Foundation

/// 8-bit RGB, height x width x 3.
struct RGB: Equatable {
    let height: Int
    let width: Int
    var bytes: [UInt8]

    var size: Geometry.Size { Geometry.Size(height: height, width: width) }

    /// A rectangle of it.
    func crop(top: Int, left: Int, height rows: Int, width columns: Int) -> RGB {
        var out = [UInt8]()
        out.reserveCapacity(rows * columns * 3)
        for row in top..<top + rows {
            let start = (row * width + left) * 3
            out += bytes[start..<start + columns * 3]
        }
        return RGB(height: rows, width: columns, bytes: out)
    }
}

/// Resizing in the fixed-point arithmetic of docs/bundle.md: first the width, rounded to bytes, then the height.
enum Resample {
    static func resize(_ picture: RGB, to size: Geometry.Size, _ filter: ImageSpec.Filter) -> RGB {
        var found = picture
        if found.width != size.width {
            let taps = Taps(found.width, size.width, filter)
            found = RGB(height: found.height, width: size.width, bytes: alongWidth(found, taps))
        }
        if found.height != size.height {
            let taps = Taps(found.height, size.height, filter)
            found = RGB(height: size.height, width: found.width, bytes: alongHeight(found, taps))
        }
        return found
    }

    /// Integer weights of one axis: output i takes `weights[i]` of the inputs from `first[i]` on.
    struct Taps {
        var first: [Int] = []
        var weights: [[Int]] = []
        var precision = 0

        init(_ sizeIn: Int, _ sizeOut: Int, _ filter: ImageSpec.Filter) {
            let scale = Double(sizeIn) / Double(sizeOut)
            let support = Self.radius(filter) * max(scale, 1)
            let shrink = scale >= 1 ? 1 / scale : 1
            var rows: [[Double]] = []
            for i in 0..<sizeOut {
                let centre = scale * (Double(i) + 0.5)
                let low = max(Int(centre - support + 0.5), 0)
                let high = min(Int(centre + support + 0.5), sizeIn)
                let raw = (low..<high).map { Self.weight(filter, (Double($0) - centre + 0.5) * shrink) }
                let sum = raw.reduce(0, +)
                rows.append(raw.map { $0 / sum })
                first.append(low)
            }
            let largest = rows.map { $0.max() ?? 0 }.max() ?? 0
            while precision < 22 && Int(0.5 + largest * Double(2 << precision)) < 1 << 15 { precision += 1 }
            let unit = Double(1 << precision)
            weights = rows.map { row in row.map { Int(($0 * unit).rounded(.toNearestOrAwayFromZero)) } }
        }

        private static func radius(_ filter: ImageSpec.Filter) -> Double {
            switch filter {
            case .bilinear: return 1
            case .bicubic: return 2
            case .lanczos: return 3
            }
        }

        private static func weight(_ filter: ImageSpec.Filter, _ value: Double) -> Double {
            let x = abs(value)
            switch filter {
            case .bilinear:
                return max(1 - x, 0)
            case .bicubic:
                let a = -0.5
                if x < 1 { return ((a + 2) * x - (a + 3)) * x * x + 1 }
                return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0
            case .lanczos:
                return x < 3 ? sinc(x) * sinc(x / 3) : 0
            }
        }

        private static func sinc(_ x: Double) -> Double {
            x == 0 ? 1 : sin(Double.pi * x) / (Double.pi * x)
        }
    }

    private static func alongWidth(_ picture: RGB, _ taps: Taps) -> [UInt8] {
        var out = [UInt8](repeating: 0, count: picture.height * taps.first.count * 3)
        let half = 1 << (taps.precision - 1)
        picture.bytes.withUnsafeBufferPointer { bytes in
            var place = 0
            for row in 0..<picture.height {
                for column in 0..<taps.first.count {
                    let start = (row * picture.width + taps.first[column]) * 3
                    let weights = taps.weights[column]
                    for channel in 0..<3 {
                        var sum = half
                        for j in 0..<weights.count { sum += weights[j] * Int(bytes[start + j * 3 + channel]) }
                        out[place] = UInt8(min(max(sum >> taps.precision, 0), 255))
                        place += 1
                    }
                }
            }
        }
        return out
    }

    private static func alongHeight(_ picture: RGB, _ taps: Taps) -> [UInt8] {
        let stride = picture.width * 3
        var out = [UInt8](repeating: 0, count: taps.first.count * stride)
        var sums = [Int](repeating: 0, count: stride)
        let half = 1 << (taps.precision - 1)
        picture.bytes.withUnsafeBufferPointer { bytes in
            for row in 0..<taps.first.count {
                for i in 0..<stride { sums[i] = half }
                for (j, weight) in taps.weights[row].enumerated() {
                    let start = (taps.first[row] + j) * stride
                    for i in 0..<stride { sums[i] += weight * Int(bytes[start + i]) }
                }
                for i in 0..<stride { out[row * stride + i] = UInt8(min(max(sums[i] >> taps.precision, 0), 255)) }
            }
        }
        return out
    }
}
