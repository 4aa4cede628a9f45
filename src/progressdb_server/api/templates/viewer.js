// Updates the part of a page that changes, and shows times in the reader's zone too. Without this script, reload the page.
"use strict";
(() => {
  const localTimes = (place) => {
    for (const time of place.querySelectorAll("time[datetime]")) {
      const shown = new Date(time.dateTime);
      if (isNaN(shown) || !shown.getTimezoneOffset()) continue;
      time.textContent = `${shown.toLocaleString()} (${time.textContent})`;
    }
  };
  localTimes(document);
  const part = document.getElementById("part");
  if (!part) return;
  let shownAt = Date.now();
  const note = document.getElementById("stale");
  const tell = (problem) => {
    const seconds = Math.round((Date.now() - shownAt) / 1000);
    note.textContent = problem && `${problem} What is shown is ${seconds} seconds old.`;
    note.classList.remove("later");
  };
  const refresh = async () => {
    try {
      if (!document.hidden) {
        const answer = await fetch(part.dataset.part, { credentials: "same-origin", redirect: "manual",
          signal: AbortSignal.timeout(10000) });
        if (answer.type === "opaqueredirect") tell("The session has ended: log in again.");
        else if (!answer.ok) tell("The server answers with an error.");
        else {
          const page = new DOMParser().parseFromString(await answer.text(), "text/html");
          part.replaceChildren(...page.body.childNodes);
          localTimes(part);
          shownAt = Date.now();
          tell("");
        }
      }
    } catch {
      tell("The server does not answer.");
    }
    setTimeout(refresh, Number(part.dataset.every));
  };
  setTimeout(refresh, Number(part.dataset.every));
})();
