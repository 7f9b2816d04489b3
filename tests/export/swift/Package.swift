// swift-tools-version:5.10
import PackageDescription

// The package of export/swift on Linux: a stand-in for Core ML, a program to compare with Python, its own tests.
let package = Package(
    name: "PocketVLMCheck",
    targets: [
        .target(name: "CoreML", path: "CoreML"),
        .target(name: "PocketVLM", dependencies: ["CoreML"], path: "Sources/PocketVLM"),
        .executableTarget(name: "Probe", dependencies: ["PocketVLM"], path: "Probe"),
        .testTarget(name: "PocketVLMTests", dependencies: ["PocketVLM", "CoreML"], path: "Tests/PocketVLMTests"),
    ]
)
