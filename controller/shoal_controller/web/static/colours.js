// Tokens as colours that a canvas understands (`light-dark()` resolved for the theme in force).
export function colours(element, names) {
  const probe = document.createElement("span");
  probe.hidden = true;
  element.append(probe);
  const found = Object.fromEntries(names.map((name) => {
    probe.style.color = `var(--${name})`;
    return [name, getComputedStyle(probe).color];
  }));
  probe.remove();
  return found;
}

export function onTheme(redraw) {
  document.addEventListener("shoal:theme", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}
