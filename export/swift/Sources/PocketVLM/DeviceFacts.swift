import Foundation

#if canImport(UIKit)
    import UIKit
#endif

/// What ran the benchmark; only what the system tells is filled in.
public struct DeviceFacts: Encodable {
    var name, kind, cpu, architecture, os: String
    var model, kernel, powerMode, powerSource, thermalState, language: String?
    var cores: Int
    var memoryMib: Double
    var batteryShare: Double?
    var packages: [String: String]
    var providers: [String]

    public static func read() async -> DeviceFacts {
        let process = ProcessInfo.processInfo
        let machine = machineName()
        var facts = DeviceFacts(
            name: machine, kind: kind(machine), cpu: machine, architecture: architecture, os: systemName,
            model: machine, language: "Swift", cores: process.activeProcessorCount,
            memoryMib: Double(process.physicalMemory) / 1_048_576, packages: [:], providers: [])
        facts.os += " " + process.operatingSystemVersionString
        #if canImport(Darwin)
            facts.thermalState = thermalState()
            facts.powerMode = process.isLowPowerModeEnabled ? "low power mode" : "normal"
            facts.providers = ["cpu", "gpu", "neural engine"]
            facts.packages = ["Core ML": process.operatingSystemVersionString]
        #endif
        #if canImport(UIKit) && !os(watchOS)
            let battery = await MainActor.run { () -> (level: Float, isCharging: Bool) in
                UIDevice.current.isBatteryMonitoringEnabled = true
                let state = UIDevice.current.batteryState
                return (UIDevice.current.batteryLevel, state == .charging || state == .full)
            }
            if battery.level >= 0 {
                facts.batteryShare = Double(battery.level)
                facts.powerSource = battery.isCharging ? "mains" : "battery"
            }
        #endif
        return facts
    }

    /// `iPhone17,1`, `Mac16,10`; the processor's name on other systems.
    private static func machineName() -> String {
        var system = utsname()
        uname(&system)
        let name = withUnsafeBytes(of: &system.machine) { bytes in
            String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
        }
        #if os(macOS)
            var size = 0
            sysctlbyname("hw.model", nil, &size, nil, 0)
            var model = [UInt8](repeating: 0, count: max(size, 1))
            sysctlbyname("hw.model", &model, &size, nil, 0)
            return String(decoding: model.prefix { $0 != 0 }, as: UTF8.self)
        #else
            return name
        #endif
    }

    private static func kind(_ machine: String) -> String {
        if machine.hasPrefix("iPhone") { return "phone" }
        if machine.hasPrefix("iPad") { return "tablet" }
        if machine.hasPrefix("MacBook") { return "laptop" }
        return "unknown"
    }

    private static var architecture: String {
        #if arch(arm64) && canImport(Darwin)
            return "arm64"
        #elseif arch(arm64)
            return "aarch64"
        #else
            return "x86_64"
        #endif
    }

    private static var systemName: String {
        #if os(iOS)
            return "iOS"
        #elseif os(visionOS)
            return "visionOS"
        #elseif os(macOS)
            return "macOS"
        #else
            return "Linux"
        #endif
    }

    static func thermalState() -> String? {
        #if canImport(Darwin)
            switch ProcessInfo.processInfo.thermalState {
            case .nominal: return "nominal"
            case .fair: return "fair"
            case .serious: return "serious"
            case .critical: return "critical"
            @unknown default: return nil
            }
        #else
            return nil
        #endif
    }

    /// Memory that the system charges to this process, now and at most, in MiB.
    static func footprint() -> (now: Double, most: Double)? {
        #if canImport(Darwin)
            var info = task_vm_info_data_t()
            var count = mach_msg_type_number_t(MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<natural_t>.size)
            let status = withUnsafeMutablePointer(to: &info) { pointer in
                pointer.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
                    task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
                }
            }
            guard status == KERN_SUCCESS else { return nil }
            let most = max(Double(info.ledger_phys_footprint_peak), Double(info.phys_footprint))
            return (Double(info.phys_footprint) / 1_048_576, most / 1_048_576)
        #else
            return nil
        #endif
    }
}
