// A small fleet's devices as tiles: name, state, what it serves and how fast.
import { make } from "./make.js";

export async function details(filter) {
  const answer = await fetch(`/api/v1/devices?limit=40&filter=${encodeURIComponent(filter)}`);
  if (!answer.ok) return {};
  const page = await answer.json();
  return Object.fromEntries(page.items.map((device) => [device.name, device]));
}

function marks(device) {
  const fallback = device?.placements?.some((placement) => placement.fallback);
  const found = [device?.quarantined && "quarantined", fallback && "fallback"].filter(Boolean);
  return found.map((text) => make("span", { className: "pill warning", textContent: text }));
}

export function tile(name, word, device) {
  const link = make("a", { href: `/devices/${encodeURIComponent(name)}`, className: "tile" });
  const state = make("span", { className: `state ${word}` });
  state.append(make("i"), word, ...marks(device));
  const speed = device?.emulated ? "unmeasured (emulated)" : device?.p95_ms == null ? "no requests" : `p95 ${Number(device.p95_ms.toPrecision(3))} ms`;
  link.append(make("b", { textContent: name }), state,
    make("small", { textContent: device?.version || "nothing yet" }), make("small", { textContent: speed }));
  return link;
}
