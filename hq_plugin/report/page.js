// Tooltips and the keyboard for marks: each group of marks is one stop of the Tab key, inside it the arrows move.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  const describe = (mark) => mark.dataset.tip;

  function show(mark, x, y) {
    tip.textContent = describe(mark);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, x + 14), document.documentElement.clientWidth - box.width - 8);
    const below = y + 18 + box.height < window.innerHeight;
    tip.style.left = `${left}px`;
    tip.style.top = `${below ? y + 18 : Math.max(8, y - box.height - 12)}px`;
  }

  function showAt(mark) {
    const box = mark.getBoundingClientRect();
    show(mark, box.left, box.bottom - 10);
  }

  function hide() {
    tip.hidden = true;
  }

  for (const group of document.querySelectorAll("[data-marks]")) {
    const marks = [...group.querySelectorAll(".mark, .row")].filter((mark) => mark.querySelector("title") || mark.title);
    marks.forEach((mark, place) => {
      // What the browser would show by itself, late and only to the mouse, moves to where everybody finds it.
      const title = mark.querySelector(":scope > title");
      mark.dataset.tip = title ? title.textContent : mark.title;
      if (title) title.remove();
      else mark.removeAttribute("title");
      mark.setAttribute("aria-label", mark.dataset.tip.replaceAll("\n", ", "));
      mark.setAttribute("tabindex", place ? "-1" : "0");
    });
    const reach = (mark) => {
      for (const other of marks) other.setAttribute("tabindex", other === mark ? "0" : "-1");
      mark.focus();
    };
    const found = (event) => {
      const mark = event.target.closest("[data-tip]");
      return mark && group.contains(mark) ? mark : null;
    };
    group.addEventListener("pointermove", (event) => {
      const mark = found(event);
      if (mark) show(mark, event.clientX, event.clientY);
      else hide();
    });
    group.addEventListener("pointerleave", hide);
    group.addEventListener("focusin", (event) => {
      const mark = found(event);
      if (!mark || !mark.matches(":focus-visible")) return;
      showAt(mark);
    });
    group.addEventListener("focusout", hide);
    group.addEventListener("keydown", (event) => {
      const place = marks.indexOf(found(event));
      const to = { ArrowRight: place + 1, ArrowDown: place + 1, ArrowLeft: place - 1, ArrowUp: place - 1,
        Home: 0, End: marks.length - 1 }[event.key];
      if (event.key === "Escape") hide();
      if (place < 0 || to === undefined || !marks[to]) return;
      event.preventDefault();
      reach(marks[to]);
    });
  }
  // The keyboard itself scrolls to what it reaches: there the tip follows.
  window.addEventListener("scroll", () => {
    const mark = document.activeElement;
    if (!tip.hidden && mark.matches("[data-tip]:focus-visible")) showAt(mark);
    else hide();
  }, { passive: true });

  const download = document.getElementById("download");
  const data = document.getElementById("data");
  if (download && data) {
    download.hidden = false;
    download.querySelector("a").href = URL.createObjectURL(new Blob([data.textContent], { type: "application/json" }));
  }
})();
