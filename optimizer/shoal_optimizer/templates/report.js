"use strict";
(() => {
  const tip = document.getElementById("tip");
  const show = (dot) => {
    tip.textContent = dot.getAttribute("aria-label");
    tip.hidden = false;
    const at = dot.querySelector(".point, path").getBoundingClientRect();
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.left + at.width / 2 - box.width / 2), innerWidth - box.width - 8);
    const above = at.top - box.height - 10;
    tip.style.left = `${left}px`;
    tip.style.top = `${above < 8 ? at.bottom + 10 : above}px`;
  };
  const hide = () => { tip.hidden = true; };
  for (const dot of document.querySelectorAll(".dot")) {
    dot.querySelector("title").remove();
    dot.addEventListener("pointerenter", () => show(dot));
    dot.addEventListener("pointerleave", hide);
    dot.addEventListener("focus", () => show(dot));
    dot.addEventListener("blur", hide);
  }
  for (const plot of document.querySelectorAll(".plot")) {
    const dots = [...plot.querySelectorAll(".dot")];
    const across = (dot) => dot.querySelector(".point, path").getBoundingClientRect().left;
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hide();
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const order = [...dots].sort((a, b) => across(a) - across(b));
      const next = order[order.indexOf(document.activeElement) + step];
      if (next) { next.focus(); event.preventDefault(); }
    });
  }
  addEventListener("scroll", hide, { passive: true });
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((part) => { part.open = false; }));
})();
