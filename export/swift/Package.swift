// swift-tools-version:5.10
import PackageDescription

let package = Package(
    name: "PocketVLM",
    platforms: [.iOS("18.0"), .macOS("15.0"), .visionOS("2.0")],
    products: [.library(name: "PocketVLM", targets: ["PocketVLM"])],
    targets: [
        .target(name: "PocketVLM"),
        .testTarget(name: "PocketVLMTests", dependencies: ["PocketVLM"]),
    ]
)
