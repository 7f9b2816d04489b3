/**
 * What the browser (or Node) says of the machine; what it does not say stays out.
 *
 * In: the module of onnxruntime. Out: the device section of `pocketvlm.bench@1`, and memory in MiB.
 */
const MIB = 1048576;
const MOST_WAIT_MS = 20_000;

/** 'Chrome 156' from a user agent; names that others pretend to be come last. */
function browserName(agent) {
  const known = { Edg: 'Edge', OPR: 'Opera', Firefox: 'Firefox', HeadlessChrome: 'Chrome', Chrome: 'Chrome' };
  for (const [mark, name] of Object.entries(known)) {
    const found = agent.match(new RegExp(`${mark}/(\\d+)`));
    if (found) return `${name} ${found[1]}`;
  }
  const safari = agent.match(/Version\/([\d.]+).*Safari/);
  if (safari) return `Safari ${safari[1]}`;
  return agent.split(' ')[0] || 'unknown browser';
}

function systemName(navigator, agent) {
  const system = navigator.userAgentData?.platform || agent.match(/\(([^;)]+)/)?.[1] || navigator.platform;
  return system || 'unknown';
}

async function accelerators() {
  try {
    const info = (await navigator.gpu?.requestAdapter())?.info;
    const name = info && [info.vendor, info.architecture, info.description].filter(Boolean).join(' ');
    return name ? [name] : [];
  } catch {
    return [];
  }
}

export async function deviceFacts(ort) {
  const agent = navigator.userAgent ?? '';
  const [name, os] = [browserName(agent), systemName(navigator, agent)];
  const found = await accelerators();
  const threads = navigator.hardwareConcurrency || 1;
  const version = ort.env.versions?.web ?? ort.env.versions?.common ?? 'unknown';
  return {
    name: `${name} on ${os}`,
    kind: 'browser',
    cpu: 'not told to a page',
    architecture: 'wasm32',
    cores: threads,
    cpus: threads,
    memory_mib: navigator.deviceMemory ? navigator.deviceMemory * 1024 : null,
    accelerators: found,
    os,
    language: `JavaScript in ${name}`,
    packages: { 'onnxruntime-web': version },
    providers: found.length ? ['webgpu', 'wasm'] : ['wasm'],
    extra: {
      user_agent: agent,
      cross_origin_isolated: String(Boolean(globalThis.crossOriginIsolated)),
      cores: 'hardware threads: a page is told no more; memory_mib is rounded by the browser, 8192 at most in some',
    },
  };
}

/** Memory of the page and its workers; null where the browser does not measure it. */
export async function memoryMib() {
  if (!globalThis.crossOriginIsolated || !performance.measureUserAgentSpecificMemory) return null;
  const late = new Promise((resolve) => setTimeout(() => resolve(null), MOST_WAIT_MS));
  try {
    const found = await Promise.race([performance.measureUserAgentSpecificMemory(), late]);
    return found && found.bytes / MIB;
  } catch {
    return null;
  }
}
