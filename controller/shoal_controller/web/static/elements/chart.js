// p95 by class on a log scale, newest values in a legend of its own.
import { colours, onTheme } from "../colours.js";
import { make } from "../make.js";

const SERIES = 8;
const TICKS = [1, 2, 5];
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const show = (value) => (value == null ? "–" : value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));

class ShoalChart extends HTMLElement {
  connectedCallback() {
    this.read = this.read.bind(this);
    document.addEventListener("shoal:reread", this.read);
    onTheme(() => this.draw(true));
    this.observer = new ResizeObserver(() => this.plot?.setSize(this.size()));
    this.read();
  }

  disconnectedCallback() {
    document.removeEventListener("shoal:reread", this.read);
    this.observer.disconnect();
    this.plot?.destroy();
  }

  size() {
    const holder = this.firstElementChild;
    return { width: Math.max(200, holder.clientWidth), height: Math.max(200, holder.clientHeight) };
  }

  async read() {
    try {
      const answer = await fetch(this.getAttribute("src"));
      if (answer.ok) this.data = await answer.json();
    } catch {
      return; // the live state says so
    }
    this.draw();
  }

  draw(restyle = false) {
    if (!this.data) return;
    const names = Object.keys(this.data.series).filter((name) => this.data.series[name].some((v) => v > 0));
    if (!names.length) {
      this.plot?.destroy();
      this.plot = null;
      this.replaceChildren(make("p", { className: "nothing", textContent: "No requests in this time. Lines appear with the first telemetry window." }));
      return;
    }
    const data = [this.data.times_ms.map((t) => t / 1000), ...names.map((n) => this.data.series[n].map((v) => (v > 0 ? v : null)))];
    if (!restyle && this.plot && String(names) === String(this.names)) this.plot.setData(data);
    else this.build(names, data);
    this.legend();
  }

  build(names, data) {
    this.plot?.destroy();
    this.names = names;
    const paint = colours(this, ["muted", "line", ...Array.from({ length: SERIES }, (_, i) => `series-${i + 1}`)]);
    this.strokes = names.map((_, i) => paint[`series-${(i % SERIES) + 1}`]);
    const holder = make("div", { className: "plot" });
    this.list = make("ul", { className: "chart-legend" });
    this.replaceChildren(holder, this.list);
    this.observer.disconnect();
    this.observer.observe(holder);
    const axis = { stroke: paint.muted, grid: { stroke: paint.line, width: 1 }, ticks: { show: false }, font: "12px Inter, sans-serif" };
    const sparse = (line) => line.filter((v) => v != null).length < 30;
    this.plot = new uPlot({
      ...this.size(), padding: [10, 14, 0, 0],
      legend: { show: false },
      cursor: { y: false, points: { size: 7 }, drag: { x: false, y: false } },
      scales: { y: { distr: 3, log: 10, range: (_, low, high) => limits(low, high) } },
      axes: [
        { ...axis, space: 80, size: 30, values: (_, splits) => splits.map((s) => clock.format(s * 1000)) },
        { ...axis, size: 46, filter: (_, splits) => splits, splits: (_, __, low, high) => ticks(low, high), values: (_, splits) => splits.map((v) => (v == null ? "" : String(Number(v.toPrecision(2))))) },
      ],
      series: [{}, ...names.map((name, i) => ({ label: name, stroke: this.strokes[i], width: 1.8, spanGaps: true, points: { show: sparse(data[i + 1]), size: 5, fill: this.strokes[i] } }))],
      hooks: { setCursor: [() => this.legend()] },
    }, data, holder);
    holder.setAttribute("role", "img");
  }

  legend() {
    const at = this.plot.cursor.idx;
    const values = this.names.map((_, i) => {
      const line = this.plot.data[i + 1];
      return at != null ? line[at] : line.findLast((v) => v != null);
    });
    this.list.replaceChildren(...this.names.map((name, i) => {
      const item = make("li", { title: name });
      const mark = document.createElement("i");
      mark.style.background = this.strokes[i];
      item.append(mark, make("span", { textContent: name }), make("b", { textContent: `${show(values[i])} ms` }));
      return item;
    }));
    const summary = this.names.map((name, i) => `${name} ${show(values[i])} ms`).join(", ");
    if (at == null) this.firstElementChild.setAttribute("aria-label", `${this.getAttribute("label")}: ${summary}`);
  }
}

// At least half a decade, so that noise on a flat line looks flat.
function limits(low, high) {
  if (low == null || high == null) return [1, 10];
  const middle = Math.sqrt(low * high);
  const half = Math.max(Math.sqrt(high / low) * 1.25, 1.9);
  return [middle / half, middle * half];
}

function ticks(low, high) {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
    for (const m of TICKS) if (m * 10 ** e >= low && m * 10 ** e <= high) found.push(Number((m * 10 ** e).toPrecision(3)));
  return found;
}
customElements.define("shoal-chart", ShoalChart);
