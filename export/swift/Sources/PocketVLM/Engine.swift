/// What runs the parts. `CoreMLEngine` is the one for devices.
public protocol Engine: AnyObject {
    /// One run of a part's function. Inputs are converted to the types that the manifest lists for the part.
    ///
    /// The decoder's functions read and write the state that `reset` made.
    func run(_ role: String, function: String, _ inputs: [String: Tensor]) throws -> [String: Tensor]

    /// A new state, all zeros.
    func reset() throws
}

/// What the vision part made of one picture: (tokens, hidden), and (layers, tokens, hidden) for deepstack.
public struct Features {
    public let tokens: Tensor
    public let deepstack: Tensor?
    public let grids: [(rows: Int, columns: Int)]

    /// The features of views, one after the other.
    static func joined(_ views: [Features]) throws -> Features {
        if views.count == 1 { return views[0] }
        let hidden = views[0].tokens.shape[1]
        let count = views.reduce(0) { $0 + $1.tokens.shape[0] }
        let tokens = Tensor(views.flatMap(\.tokens.floats), [count, hidden])
        var stack: Tensor?
        if let layers = views[0].deepstack?.shape[0] {
            let parts = views.map { (values: $0.deepstack!.floats, tokens: $0.tokens.shape[0]) }
            let values = (0..<layers).flatMap { layer in
                parts.flatMap { $0.values[layer * $0.tokens * hidden..<(layer + 1) * $0.tokens * hidden] }
            }
            stack = Tensor(values, [layers, count, hidden])
        }
        return Features(tokens: tokens, deepstack: stack, grids: views.flatMap(\.grids))
    }
}
