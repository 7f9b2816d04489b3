import Foundation

public struct MLCPUComputeDevice {}
public struct MLGPUComputeDevice {}
public struct MLNeuralEngineComputeDevice {}

public enum MLComputeDevice {
    case cpu(MLCPUComputeDevice)
    case gpu(MLGPUComputeDevice)
    case neuralEngine(MLNeuralEngineComputeDevice)
}

public enum MLModelStructure {
    public struct Program {
        public struct Operation {}

        public struct Block {
            public let operations: [Operation]
        }

        public struct Function {
            public let block: Block
        }

        public let functions: [String: Function]
    }

    case program(Program)
    case unsupported
}

/// Plans everything for the CPU.
public final class MLComputePlan {
    public struct DeviceUsage {
        public let supported: [MLComputeDevice]
        public let preferred: MLComputeDevice
    }

    public let modelStructure: MLModelStructure

    init(_ structure: MLModelStructure) {
        modelStructure = structure
    }

    public static func load(contentsOf url: URL, configuration: MLModelConfiguration) async throws -> MLComputePlan {
        let block = MLModelStructure.Program.Block(operations: [.init(), .init()])
        return MLComputePlan(.program(.init(functions: [configuration.functionName ?? "main": .init(block: block)])))
    }

    public func deviceUsage(for operation: MLModelStructure.Program.Operation) -> DeviceUsage? {
        DeviceUsage(supported: [.cpu(.init())], preferred: .cpu(.init()))
    }
}
