// One event stream for all tabs: a SharedWorker holds it; a plain EventSource where workers are missing.
const STREAM = "/api/v1/stream";

export function openStream(listener) {
  const worker = new URL("./stream-worker.js", import.meta.url);
  if (typeof SharedWorker === "undefined") {
    import("./source.js").then(({ connect }) => connect(STREAM, listener));
    return;
  }
  const port = new SharedWorker(worker, { type: "module", name: "shoal-stream" }).port;
  port.onmessage = (event) => listener(event.data);
  port.start();
  port.postMessage({ stream: STREAM });
  addEventListener("pagehide", () => port.postMessage({ close: true }));
  addEventListener("pageshow", (event) => {
    if (event.persisted) port.postMessage({ stream: STREAM });
  });
}
