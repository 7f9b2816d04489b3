// A stand-in for Apple's Core ML where there is none: the declarations that export/swift uses, as Apple documents
// them. A model is evaluated by tests/export/swift_standin.py at the other end of two pipes in $POCKETVLM_STANDIN.
// It proves what the package feeds and takes, not that Apple's framework accepts it.
import Foundation

public enum MLComputeUnits: Int {
    case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine
}

public final class MLModelConfiguration {
    public var computeUnits = MLComputeUnits.all
    public var functionName: String?

    public init() {}
}

public enum MLMultiArrayDataType: Int {
    case double = 65600
    case float32 = 65568
    case float16 = 65552
    case int32 = 131104
}

public final class MLMultiArray {
    public let shape: [NSNumber]
    public let strides: [NSNumber]
    public let dataType: MLMultiArrayDataType
    private let buffer: UnsafeMutableRawBufferPointer

    /// `gap`: items left free after each row of the last axis, as outputs of a device may have.
    init(_ shape: [Int], _ type: MLMultiArrayDataType, gap: Int) {
        self.shape = shape.map { NSNumber(value: $0) }
        dataType = type
        var steps = [Int]()
        var step = 1
        for (axis, size) in shape.enumerated().reversed() {
            steps.insert(step, at: 0)
            step *= axis == shape.count - 1 ? size + gap : size
        }
        strides = steps.map { NSNumber(value: $0) }
        buffer = .allocate(byteCount: max(step * MLMultiArray.itemBytes(type), 16), alignment: 16)
        buffer.initializeMemory(as: UInt8.self, repeating: 0xFF)
    }

    public convenience init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws {
        self.init(shape.map(\.intValue), dataType, gap: 0)
    }

    deinit {
        buffer.deallocate()
    }

    public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R {
        try body(UnsafeRawBufferPointer(buffer))
    }

    public func withUnsafeMutableBytes<R>(_ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R) rethrows -> R {
        try body(buffer, strides.map(\.intValue))
    }

    static func itemBytes(_ type: MLMultiArrayDataType) -> Int {
        switch type {
        case .double: return 8
        case .float16: return 2
        default: return 4
        }
    }
}

public final class MLFeatureValue {
    public let multiArrayValue: MLMultiArray?

    public init(multiArray: MLMultiArray) {
        multiArrayValue = multiArray
    }
}

public protocol MLFeatureProvider: AnyObject {
    var featureNames: Set<String> { get }
    func featureValue(for featureName: String) -> MLFeatureValue?
}

public final class MLDictionaryFeatureProvider: MLFeatureProvider {
    private let values: [String: MLFeatureValue]

    public init(dictionary: [String: Any]) throws {
        values = dictionary.compactMapValues { $0 as? MLFeatureValue }
    }

    public var featureNames: Set<String> { Set(values.keys) }

    public func featureValue(for featureName: String) -> MLFeatureValue? { values[featureName] }
}

public final class MLMultiArrayConstraint {
    public let dataType: MLMultiArrayDataType

    init(_ type: MLMultiArrayDataType) {
        dataType = type
    }
}

public final class MLFeatureDescription {
    public let multiArrayConstraint: MLMultiArrayConstraint?

    init(_ type: MLMultiArrayDataType) {
        multiArrayConstraint = MLMultiArrayConstraint(type)
    }
}

public final class MLModelDescription {
    public let inputDescriptionsByName: [String: MLFeatureDescription]

    init(_ inputs: [String: MLFeatureDescription]) {
        inputDescriptionsByName = inputs
    }
}

public final class MLState {
    let number: Int

    init(_ number: Int) {
        self.number = number
    }
}

public final class MLModel {
    public let modelDescription: MLModelDescription
    private let path: String
    private let function: String?

    init(_ path: String, _ function: String?, _ description: MLModelDescription) {
        self.path = path
        self.function = function
        modelDescription = description
    }

    /// A "compiled" model is a directory with a file that names the package.
    public static func compileModel(at url: URL) async throws -> URL {
        let made = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString + ".mlmodelc")
        try FileManager.default.createDirectory(at: made, withIntermediateDirectories: true)
        try Data(url.path.utf8).write(to: made.appendingPathComponent("package"))
        return made
    }

    public static func load(contentsOf url: URL, configuration: MLModelConfiguration) async throws -> MLModel {
        let path = String(
            decoding: try Data(contentsOf: url.appendingPathComponent("package")), as: UTF8.self)
        let (found, _) = try Pipes.ask("describe", path, configuration.functionName, nil, [:])
        let inputs = try found.mapValues { MLFeatureDescription(try Pipes.type($0.dtype)) }
        return MLModel(path, configuration.functionName, MLModelDescription(inputs))
    }

    public func makeState() -> MLState {
        let (_, number) = try! Pipes.ask("state", path, function, nil, [:])
        return MLState(number!)
    }

    public func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider {
        try predict(input, nil)
    }

    public func prediction(from input: any MLFeatureProvider, using state: MLState) throws -> any MLFeatureProvider {
        try predict(input, state.number)
    }

    private func predict(_ input: any MLFeatureProvider, _ state: Int?) throws -> any MLFeatureProvider {
        var given: [String: MLMultiArray] = [:]
        for name in input.featureNames { given[name] = input.featureValue(for: name)?.multiArrayValue }
        let (found, _) = try Pipes.ask("predict", path, function, state, given)
        let values = try found.mapValues { MLFeatureValue(multiArray: try $0.array()) }
        return try MLDictionaryFeatureProvider(dictionary: values)
    }
}
