#if canImport(CoreML)
    import CoreML
    import Foundation

    /// Runs a bundle's packages by Core ML. Both functions of the decoder share one `MLState`.
    public final class CoreMLEngine: Engine {
        /// What opening took. `compileMs` is 0 where a compiled model was kept from an earlier start.
        public struct OpenTimes {
            public var compileMs = 0.0
            public var loadMs = 0.0
        }

        public private(set) var times = OpenTimes()
        /// Compiled models by part, for `ComputeUnits`.
        public private(set) var compiled: [String: URL] = [:]
        public let computeUnits: MLComputeUnits
        private var models: [String: MLModel] = [:]
        private var state: MLState?

        /// Compiles what is not in `cache` yet (a directory of the app; nil: the system's caches), and loads it all.
        public init(_ files: BundleFiles, computeUnits: MLComputeUnits = .all, cache: URL? = nil) async throws {
            self.computeUnits = computeUnits
            guard let stateful = files.manifest.stateful else {
                throw PocketError("manifest.json: format \(files.manifest.format), wanted coreml; export for iphone")
            }
            let kept = try cache ?? Self.defaultCache()
            for part in files.manifest.parts {
                let url = try await compile(part, files, kept)
                compiled[part.role] = url
                let functions = stateful.functions[part.role] ?? []
                let clock = Clock()
                for function in functions {
                    let configuration = Self.configuration(computeUnits, functions.count > 1 ? function : nil)
                    models["\(part.role).\(function)"] = try await MLModel.load(
                        contentsOf: url, configuration: configuration)
                }
                times.loadMs += clock.ms
            }
        }

        static func configuration(_ units: MLComputeUnits, _ function: String?) -> MLModelConfiguration {
            let found = MLModelConfiguration()
            found.computeUnits = units
            if let function { found.functionName = function }
            return found
        }

        public func reset() throws {
            state = try model("decoder", "decode").makeState()
        }

        public func run(_ role: String, function: String, _ inputs: [String: Tensor]) throws -> [String: Tensor] {
            let model = try model(role, function)
            var values: [String: MLFeatureValue] = [:]
            for (name, description) in model.modelDescription.inputDescriptionsByName {
                guard let given = inputs[name] else {
                    throw PocketError("\(role).\(function): wants the input \(name), which nobody fills; re-export")
                }
                let type = description.multiArrayConstraint?.dataType ?? .float32
                values[name] = MLFeatureValue(multiArray: try Self.array(given, type))
            }
            let features = try MLDictionaryFeatureProvider(dictionary: values)
            let made: any MLFeatureProvider
            if role == "decoder" {
                guard let state else { throw PocketError("decoder: has no state; call reset first") }
                made = try model.prediction(from: features, using: state)
            } else {
                made = try model.prediction(from: features)
            }
            var out: [String: Tensor] = [:]
            for name in made.featureNames {
                guard let array = made.featureValue(for: name)?.multiArrayValue else { continue }
                out[name] = try Self.tensor(array, name)
            }
            return out
        }

        private func model(_ role: String, _ function: String) throws -> MLModel {
            guard let found = models["\(role).\(function)"] else {
                throw PocketError("\(role): has no function \(function); re-export")
            }
            return found
        }

        private func compile(_ part: Manifest.Part, _ files: BundleFiles, _ cache: URL) async throws -> URL {
            let kept = cache.appendingPathComponent("\(part.role)-\(part.sha256.prefix(16)).mlmodelc")
            if FileManager.default.fileExists(atPath: kept.path) { return kept }
            let clock = Clock()
            let made = try await MLModel.compileModel(at: files.locate(part.path))
            times.compileMs += clock.ms
            try FileManager.default.createDirectory(at: cache, withIntermediateDirectories: true)
            try FileManager.default.moveItem(at: made, to: kept)
            return kept
        }

        private static func defaultCache() throws -> URL {
            let caches = try FileManager.default.url(
                for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
            return caches.appendingPathComponent("PocketVLM")
        }
    }

    extension CoreMLEngine {
        /// A multi-array of a type with these values.
        static func array(_ tensor: Tensor, _ type: MLMultiArrayDataType) throws -> MLMultiArray {
            let out = try MLMultiArray(shape: tensor.shape.map { NSNumber(value: $0) }, dataType: type)
            let count = tensor.count
            try out.withUnsafeMutableBytes { bytes, _ in
                switch (type, tensor.values) {
                case (.int32, .int(let values)):
                    let place = bytes.bindMemory(to: Int32.self)
                    for i in 0..<count { place[i] = Int32(values[i]) }
                case (.float32, _):
                    let (place, values) = (bytes.bindMemory(to: Float.self), tensor.floats)
                    for i in 0..<count { place[i] = values[i] }
                case (.float16, _):
                    let (place, values) = (bytes.bindMemory(to: Float16.self), tensor.floats)
                    for i in 0..<count { place[i] = Float16(values[i]) }
                default:
                    throw PocketError("input: no way to make type \(type.rawValue) of \(tensor.shape); re-export")
                }
            }
            return out
        }

        /// The values of a multi-array, whose rows may have gaps between them.
        static func tensor(_ array: MLMultiArray, _ name: String) throws -> Tensor {
            let (shape, strides) = (array.shape.map(\.intValue), array.strides.map(\.intValue))
            var places = [0]
            for (size, stride) in zip(shape, strides) {
                places = places.flatMap { start in (0..<size).map { start + $0 * stride } }
            }
            let values: [Float] = try array.withUnsafeBytes { bytes in
                switch array.dataType {
                case .float32:
                    let found = bytes.bindMemory(to: Float.self)
                    return places.map { found[$0] }
                case .float16:
                    let found = bytes.bindMemory(to: Float16.self)
                    return places.map { Float(found[$0]) }
                case .int32:
                    let found = bytes.bindMemory(to: Int32.self)
                    return places.map { Float(found[$0]) }
                default:
                    throw PocketError("\(name): comes in a type that this reader does not know; re-export")
                }
            }
            return Tensor(values, shape)
        }
    }
#endif
