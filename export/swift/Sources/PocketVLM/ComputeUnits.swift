#if canImport(CoreML)
    import CoreML
    import Foundation

    /// Which compute unit Core ML plans for the operations of a part.
    public struct ComputeUnits {
        /// The unit with the most operations, and how many each has.
        public let unit: String
        public let note: String

        /// By part. A part whose plan cannot be had is left out.
        @available(iOS 17.4, macOS 14.4, visionOS 1.1, *)
        public static func planned(_ engine: CoreMLEngine, _ manifest: Manifest) async -> [String: ComputeUnits] {
            var found: [String: ComputeUnits] = [:]
            for (role, url) in engine.compiled {
                let functions = manifest.stateful?.functions[role] ?? []
                var counts: [String: Int] = [:]
                for function in functions {
                    let configuration = CoreMLEngine.configuration(
                        engine.computeUnits, functions.count > 1 ? function : nil)
                    guard let plan = try? await MLComputePlan.load(contentsOf: url, configuration: configuration),
                        case .program(let program) = plan.modelStructure,
                        let block = (program.functions[function] ?? program.functions["main"])?.block
                    else { continue }
                    for operation in block.operations {
                        guard let usage = plan.deviceUsage(for: operation) else { continue }
                        counts[name(usage.preferred), default: 0] += 1
                    }
                }
                found[role] = summary(counts)
            }
            return found
        }

        private static func name(_ device: MLComputeDevice) -> String {
            switch device {
            case .cpu: return "cpu"
            case .gpu: return "gpu"
            case .neuralEngine: return "neural engine"
            @unknown default: return "other"
            }
        }

        private static func summary(_ counts: [String: Int]) -> ComputeUnits? {
            let ordered = counts.sorted { ($1.value, $0.key) < ($0.value, $1.key) }
            guard let most = ordered.first else { return nil }
            let all = counts.values.reduce(0, +)
            let shares = ordered.map { "\($0.key) \($0.value) of \(all)" }.joined(separator: ", ")
            return ComputeUnits(unit: most.key, note: "planned operations, all functions: \(shares)")
        }
    }
#endif
