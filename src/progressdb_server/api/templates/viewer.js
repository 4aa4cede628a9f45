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
  const refresh = async () => {
    try {
      if (!document.hidden) {
        const answer = await fetch(part.dataset.part, { credentials: "same-origin", redirect: "error" });
        if (answer.ok) {
          const page = new DOMParser().parseFromString(await answer.text(), "text/html");
          part.replaceChildren(...page.body.childNodes);
          localTimes(part);
          const live = document.getElementById("live");
          if (live) {
            const working = part.querySelectorAll("[data-working]").length;
            live.textContent = working ? `Unfinished jobs: ${working}. This page updates itself.` : "All jobs are finished.";
          }
        }
      }
    } catch {
      return; // the session has ended or the server is down: keep what was shown last
    }
    setTimeout(refresh, Number(part.dataset.every));
  };
  setTimeout(refresh, Number(part.dataset.every));
})();
