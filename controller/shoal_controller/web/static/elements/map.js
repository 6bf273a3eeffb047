// Every device, by profile class: one character a device. Few devices are tiles with names, many are a canvas.
import { colours, onTheme } from "../colours.js";
import { make } from "../make.js";
import { details, tile } from "../tiles.js";

const WORDS = { h: "healthy", u: "updating", d: "degraded", r: "drifting", o: "offline", x: "revoked" };
const FEW = 40;

class ShoalMap extends HTMLElement {
  connectedCallback() {
    this.read = this.read.bind(this);
    document.addEventListener("shoal:reread", this.read);
    onTheme(() => this.draw());
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this);
    this.read();
  }

  disconnectedCallback() {
    document.removeEventListener("shoal:reread", this.read);
    this.observer.disconnect();
  }

  async read() {
    try {
      const answer = await fetch(this.getAttribute("src"));
      if (!answer.ok) return;
      this.data = await answer.json();
      this.total = this.data.states.reduce((sum, states) => sum + states.length, 0);
      const filter = new URLSearchParams(this.getAttribute("src").split("?")[1]).get("filter") || "";
      if (this.total <= FEW) this.known = await details(filter);
    } catch {
      return; // the live state says so
    }
    this.draw(true);
  }

  draw(fresh = false) {
    if (!this.data) return;
    const width = this.clientWidth;
    if (!fresh && width === this.width && !this.canvases) return;
    this.width = width;
    const total = this.total;
    this.canvases = total > FEW || !this.data.names;
    const focused = this.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    this.tip?.remove();
    const size = total > 6000 ? 5 : total > 2000 ? 6 : total > 400 ? 9 : 14;
    this.classList.toggle("few", !this.canvases);
    const paint = this.canvases && colours(this, ["healthy-tile", "updating", "degraded", "drifting", "offline", "line-strong"]);
    const rows = this.data.classes.map((name, index) => this.section(name, index, size, paint))
      .filter((row) => row);
    if (!rows.length) rows.push(make("p", { className: "nothing", textContent: "No device matches." }));
    this.replaceChildren(...rows);
    if (focused) this.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  }

  section(name, index, size, paint) {
    const states = this.data.states[index];
    if (!states.length) return null;
    const section = make("div", { className: "map-class" });
    const count = (state) => states.split(state).length - 1;
    const others = [..."udrox"].filter(count).map((state) => `${count(state).toLocaleString("en")} ${WORDS[state]}`);
    const label = make("div", { className: "map-label" });
    const link = make("a", { className: "class", href: `/?filter=${encodeURIComponent(`class:"${name}"`)}` });
    const [hardware, ...runtimes] = name.split("+");
    link.append(make("b", { textContent: hardware || "unknown" }),
      ...runtimes.map((runtime) => make("small", { textContent: `+${runtime}` })));
    const sum = make("span", { className: "sum", textContent: [states.length.toLocaleString("en"), ...others].join(" · ") });
    label.append(link, ...(this.canvases ? [sum] : []));
    section.append(label, this.canvases ? this.canvas(states, index, size, paint, sum.textContent) : this.tiles(states, index));
    return section;
  }

  tiles(states, index) {
    const tiles = make("div", { className: "map-tiles" });
    [...states].forEach((state, n) => {
      const name = this.data.names[index][n];
      tiles.append(tile(name, WORDS[state], this.known?.[name]));
    });
    return tiles;
  }

  canvas(states, index, size, paint, summary) {
    const columns = Math.max(1, Math.floor((this.width + 2) / size));
    const rows = Math.ceil(states.length / columns);
    const scale = devicePixelRatio || 1;
    const canvas = document.createElement("canvas");
    canvas.width = this.width * scale;
    canvas.height = rows * size * scale;
    canvas.style.height = `${rows * size}px`;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${this.data.classes[index]}: ${summary} devices`);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const gap = size > 8 ? 2 : 1;
    const fill = { h: paint["healthy-tile"], u: paint.updating, d: paint.degraded, r: paint.drifting, o: paint.offline, x: paint["line-strong"] };
    for (let n = 0; n < states.length; n++) {
      context.fillStyle = fill[states[n]] || paint.offline;
      context.fillRect((n % columns) * size, Math.floor(n / columns) * size, size - gap, size - gap);
    }
    const at = (event) => Math.floor(event.offsetY / size) * columns + Math.floor(event.offsetX / size);
    canvas.onmousemove = (event) => this.hover(event, states[at(event)], this.data.names?.[index][at(event)]);
    canvas.onmouseleave = () => this.tip?.remove();
    canvas.onclick = (event) => {
      const name = this.data.names?.[index][at(event)];
      if (name) location.href = `/devices/${encodeURIComponent(name)}`;
    };
    return canvas;
  }

  hover(event, state, name) {
    this.tip ||= make("div", { className: "map-tip" });
    if (!state) return this.tip.remove();
    this.tip.textContent = name ? `${name} · ${WORDS[state]}` : WORDS[state];
    this.tip.style.left = `${Math.min(event.clientX + 12, innerWidth - 180)}px`;
    this.tip.style.top = `${event.clientY + 14}px`;
    document.body.append(this.tip);
  }
}
customElements.define("shoal-map", ShoalMap);
