// `/` filter, `g` + letter go, `?` help, `Esc` leave; rows are the table element's.
const typing = (target) => target.matches?.("input, textarea, select, [contenteditable]");

export function startKeyboard() {
  let going = 0;
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && typing(event.target)) return event.target.blur();
    if (typing(event.target) || document.querySelector("dialog[open]")) return;
    if (Date.now() - going < 1500) {
      going = 0;
      const link = document.querySelector(`.side nav a[data-key="${CSS.escape(event.key)}"]`);
      if (link) {
        event.preventDefault();
        link.click();
      }
    } else if (event.key === "g") {
      going = Date.now();
    } else if (event.key === "/") {
      const field = document.getElementById("filter");
      if (field) {
        event.preventDefault();
        field.focus();
        field.select();
      }
    } else if (event.key === "?") {
      document.getElementById("help").showModal();
    }
  });
}
