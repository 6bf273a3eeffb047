// The state of the one event stream, always on screen; turns its messages into page refreshes.
//   shoal:message  {kind, object, ...} one change      shoal:refresh  the page asks the server again
import { openStream } from "../stream.js";
import { span } from "../ages.js";

class ShoalLive extends HTMLElement {
  connectedCallback() {
    this.label = this.querySelector("span");
    this.heard = Date.now();
    this.lost = 0;
    this.due = 0;
    openStream((message) => this.receive(message));
    setInterval(() => this.show(), 1000);
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden && this.stale) this.refresh();
    });
  }

  receive(message) {
    this.heard = Date.now();
    if (message.type === "open") {
      if (this.lost) this.refresh();
      this.lost = 0;
      this.setAttribute("state", "live");
    } else if (message.type === "lost") {
      this.lost ||= Date.now();
      this.setAttribute("state", "lost");
    } else if (message.type === "resync") {
      this.refresh();
    } else {
      document.dispatchEvent(new CustomEvent("shoal:message", { detail: message }));
      this.consider(message);
    }
    this.show();
  }

  // A page names the kinds that change it; many changes make one refresh.
  consider(message) {
    const page = document.getElementById("page");
    const wanted = (page?.dataset.live || "").split(" ");
    const kinds = message.kinds || [message.kind];
    if (!wanted.includes("*") && !kinds.some((kind) => wanted.includes(kind))) return;
    const every = Number(page.dataset.every || 1500);
    if (this.due) return;
    const wait = Math.max(150, every - (Date.now() - (this.refreshed || 0)));
    this.due = setTimeout(() => this.refresh(), wait);
  }

  refresh() {
    clearTimeout(this.due);
    this.due = 0;
    this.stale = document.hidden;
    if (this.stale) return;
    this.refreshed = Date.now();
    document.body.dispatchEvent(new CustomEvent("shoal:refresh"));
    document.dispatchEvent(new CustomEvent("shoal:reread"));
  }

  show() {
    const text = this.lost ? `reconnecting, ${span(Date.now() - this.lost)} old` :
      this.getAttribute("state") === "live" ? "live" : "connecting";
    if (this.label.textContent !== text) this.label.textContent = text;
  }
}
customElements.define("shoal-live", ShoalLive);
