// An EventSource as a listener of plain objects: {type: "open" | "lost" | "resync" | "change" | "tick", ...}.
// It reads again after a cut, by itself; it never replays.
const NAMES = ["change", "tick", "resync"];

export function connect(address, listener) {
  let source = null;
  let timer = 0;
  const open = () => {
    source = new EventSource(address);
    source.onopen = () => listener({ type: "open" });
    source.onerror = () => {
      listener({ type: "lost" });
      // The browser gives up for good when the answer is not a stream, as from a proxy of a stopped server.
      if (source.readyState === EventSource.CLOSED) timer = setTimeout(open, 1000);
    };
    const receive = (event) => {
      let data = {};
      try {
        data = JSON.parse(event.data || "{}");
      } catch {
        return;
      }
      listener({ type: event.type === "message" ? "change" : event.type, ...data });
    };
    source.onmessage = receive;
    for (const name of NAMES) source.addEventListener(name, receive);
  };
  open();
  return () => {
    clearTimeout(timer);
    source.close();
  };
}
