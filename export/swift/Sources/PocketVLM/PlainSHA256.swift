#if !canImport(CryptoKit)
    import Foundation

    /// SHA-256 (FIPS 180-4) for builds without CryptoKit, as the tests on Linux are; slow.
    struct PlainSHA256 {
        private var state: [UInt32] = [
            0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19,
        ]
        private var held: [UInt8] = []
        private var length = 0

        /// First 32 bits of the fractions of the cube roots of the first 64 primes.
        private static let constants: [UInt32] = {
            var primes: [Int] = []
            var candidate = 2
            while primes.count < 64 {
                if primes.allSatisfy({ candidate % $0 != 0 }) { primes.append(candidate) }
                candidate += 1
            }
            return primes.map { prime in
                let root = cbrt(Double(prime))
                return UInt32((root - root.rounded(.down)) * 4_294_967_296)
            }
        }()

        mutating func update(data: Data) {
            length += data.count
            held += data
            let whole = held.count / 64 * 64
            held.withUnsafeBufferPointer { bytes in
                for start in stride(from: 0, to: whole, by: 64) {
                    Self.compress(&state, UnsafeBufferPointer(rebasing: bytes[start..<start + 64]))
                }
            }
            held.removeFirst(whole)
        }

        mutating func finalize() -> [UInt8] {
            let bits = UInt64(length) * 8
            let padding = (119 - length % 64) % 64
            let tail = [0x80] + [UInt8](repeating: 0, count: padding)
            update(data: Data(tail + (0..<8).map { UInt8(truncatingIfNeeded: bits >> (56 - 8 * UInt64($0))) }))
            return state.flatMap { word in (0..<4).map { UInt8(truncatingIfNeeded: word >> (24 - 8 * UInt32($0))) } }
        }

        private static func compress(_ state: inout [UInt32], _ block: UnsafeBufferPointer<UInt8>) {
            var w = [UInt32](repeating: 0, count: 64)
            for i in 0..<16 { w[i] = (0..<4).reduce(0) { $0 << 8 | UInt32(block[4 * i + $1]) } }
            for i in 16..<64 {
                let low = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3
                let high = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10
                w[i] = w[i - 16] &+ low &+ w[i - 7] &+ high
            }
            var s = state
            for i in 0..<64 {
                let choice = (s[4] & s[5]) ^ (~s[4] & s[6])
                let first =
                    s[7] &+ (turn(s[4], 6) ^ turn(s[4], 11) ^ turn(s[4], 25)) &+ choice &+ constants[i] &+ w[i]
                let majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2])
                let second = (turn(s[0], 2) ^ turn(s[0], 13) ^ turn(s[0], 22)) &+ majority
                s = [first &+ second, s[0], s[1], s[2], s[3] &+ first, s[4], s[5], s[6]]
            }
            for i in 0..<8 { state[i] = state[i] &+ s[i] }
        }

        private static func turn(_ value: UInt32, _ bits: UInt32) -> UInt32 {
            value >> bits | value << (32 - bits)
        }
    }
#endif
