/// Numbers with a shape, in C order. What a part takes or gives in another type is converted at its border.
public struct Tensor: Equatable {
    public enum Values: Equatable {
        case float([Float])
        case int([Int])
        case byte([UInt8])
    }

    public var shape: [Int]
    public var values: Values

    public init(_ values: [Float], _ shape: [Int]) {
        self.values = .float(values)
        self.shape = shape
    }

    public init(_ values: [Int], _ shape: [Int]) {
        self.values = .int(values)
        self.shape = shape
    }

    public init(_ values: [UInt8], _ shape: [Int]) {
        self.values = .byte(values)
        self.shape = shape
    }

    public var count: Int { shape.reduce(1, *) }

    public var floats: [Float] {
        switch values {
        case .float(let found): return found
        case .int(let found): return found.map(Float.init)
        case .byte(let found): return found.map(Float.init)
        }
    }
}
