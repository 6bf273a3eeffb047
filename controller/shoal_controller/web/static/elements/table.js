// Rows by keyboard: j, k or arrows move, Enter opens. The rows themselves are the server's HTML.
class ShoalTable extends HTMLElement {
  connectedCallback() {
    this.onKey = (event) => this.key(event);
    document.addEventListener("keydown", this.onKey);
  }

  disconnectedCallback() {
    document.removeEventListener("keydown", this.onKey);
  }

  get links() {
    return [...this.querySelectorAll("tbody tr td:first-child a")];
  }

  key(event) {
    const target = event.target;
    if (event.ctrlKey || event.metaKey || event.altKey || target.matches?.("input, textarea, select")) return;
    if (document.querySelector("dialog[open]")) return;
    const inside = this.contains(target);
    const step = { j: 1, k: -1, ArrowDown: inside ? 1 : 0, ArrowUp: inside ? -1 : 0 }[event.key];
    if (!step) return;
    const links = this.links;
    const here = links.findIndex((link) => link.closest("tr").contains(document.activeElement));
    const next = here < 0 ? (step > 0 ? 0 : links.length - 1) : here + step;
    if (next >= links.length) this.turn("next");
    else if (next < 0) this.turn("prev");
    else {
      event.preventDefault();
      links[next].focus();
      links[next].closest("tr").scrollIntoView({ block: "nearest" });
    }
  }

  turn(rel) {
    this.parentElement.querySelector(`.pager a[rel="${rel}"]`)?.click();
  }
}
customElements.define("shoal-table", ShoalTable);
