// What every page has: elements, keyboard, dialogs, copy buttons, ages that count.
import "./elements/live.js";
import "./elements/map.js";
import "./elements/chart.js";
import "./elements/table.js";
import { startAges } from "./ages.js";
import { startKeyboard } from "./keyboard.js";

const root = document.documentElement;
const page = document.getElementById("page");

document.addEventListener("click", async (event) => {
  const target = event.target.closest("[data-theme-toggle], [data-dialog], [data-close], [data-copy]");
  if (!target) return;
  if (target.matches("[data-theme-toggle]")) {
    const dark = getComputedStyle(root).colorScheme === "dark" ||
      (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("shoal-theme", root.dataset.theme);
    document.dispatchEvent(new CustomEvent("shoal:theme"));
  } else if (target.dataset.dialog) {
    document.getElementById(target.dataset.dialog)?.showModal();
  } else if (target.matches("[data-close]")) {
    target.closest("dialog").close();
  } else {
    const label = target.querySelector("span");
    try {
      await navigator.clipboard.writeText(target.parentElement.querySelector("code").textContent);
      label.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(target.parentElement.querySelector("code"));
      label.textContent = "Selected";
    }
    setTimeout(() => { label.textContent = "Copy"; }, 1600);
  }
});

startAges(page);
startKeyboard();
document.querySelector(".side nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
