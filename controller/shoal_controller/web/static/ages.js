// Ages count on their own; moments are shown in the reader's time zone.
export function span(ms) {
  const s = Math.max(0, ms) / 1000;
  if (s < 90) return `${Math.round(s)} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  return s < 129600 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} d`;
}

const moment = new Intl.DateTimeFormat("en-GB", {
  day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit",
});

function show() {
  const now = Date.now();
  for (const time of document.querySelectorAll("time[data-ago]")) {
    const text = `${span(now - Number(time.dataset.ago))} ago`;
    if (time.textContent !== text) time.textContent = text;
  }
  for (const time of document.querySelectorAll("time[data-at]")) {
    const text = moment.format(Number(time.dataset.at)).replace(",", "");
    if (time.textContent !== text) time.textContent = text;
  }
}

export function startAges(page) {
  show();
  setInterval(show, 1000);
  new MutationObserver(show).observe(page, { childList: true, subtree: true });
}
