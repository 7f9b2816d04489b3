import Foundation

/// Everything that this package refuses, in one line: where, what was found, what to do.
public struct PocketError: Error, CustomStringConvertible, LocalizedError {
    public let description: String

    public init(_ description: String) {
        self.description = description
    }

    public var errorDescription: String? { description }
}
