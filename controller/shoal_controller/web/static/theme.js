// Before the first paint: the theme that the reader chose, if any; else the system's.
const chosen = localStorage.getItem("shoal-theme");
if (chosen) document.documentElement.dataset.theme = chosen;
