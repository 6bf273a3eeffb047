// Shared by all tabs of this origin: one connection, as HTTP/1.1 has only six.
import { connect } from "./source.js";

const ports = new Set();
let close = null;
let state = null;

onconnect = (event) => {
  const port = event.ports[0];
  port.onmessage = ({ data }) => {
    if (data.close) {
      ports.delete(port);
      if (!ports.size && close) {
        close();
        close = state = null;
      }
      return;
    }
    ports.add(port);
    if (state) port.postMessage(state);
    close ||= connect(data.stream, (message) => {
      if (message.type === "open" || message.type === "lost") state = message;
      for (const each of ports) each.postMessage(message);
    });
  };
};
