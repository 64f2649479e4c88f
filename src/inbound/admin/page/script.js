// Refreshes the live part of a page, and copies texts. Everything else works without it.
"use strict";

document.documentElement.classList.add("script");
const line = document.querySelector("[data-say]");
const say = (text) => { line.textContent = text; };

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    say(`Copied: ${button.dataset.copy}`);
  } catch {
    say("The browser does not let the page copy: select the text instead.");
  }
});

const live = document.querySelector("[data-live]");
if (live) {
  const pause = document.querySelector("[data-pause]");
  const asOf = document.querySelector("[data-as-of]");
  let paused = false;
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.textContent = paused ? "Continue" : "Pause";
    say(paused ? "Paused" : "");
  });

  // Whoever is reading, selecting or about to press something there is not disturbed.
  const inUse = () => {
    const selection = getSelection();
    return live.contains(document.activeElement) || (!selection.isCollapsed && live.contains(selection.anchorNode));
  };
  const refresh = async () => {
    if (!paused && !document.hidden && !inUse()) {
      try {
        const answer = await fetch(live.dataset.live, { headers: { Accept: "text/html" } });
        if (!answer.ok) throw new Error(answer.status);
        const text = await answer.text();
        if (!paused && !inUse()) {
          live.innerHTML = text;
          asOf.textContent = `As of ${new Date().toISOString().slice(0, 19).replace("T", " ")} UTC.`;
        }
        if (line.textContent.startsWith("No answer")) say("");
      } catch {
        say("No answer from adsidecar: trying again.");
      }
    }
    setTimeout(refresh, live.dataset.every * 1000);
  };
  setTimeout(refresh, live.dataset.every * 1000);
}
