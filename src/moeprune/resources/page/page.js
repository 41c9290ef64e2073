"use strict";

/* Light and dark: as the system says, until the reader chooses. */
function addThemeSwitch(button) {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  };
  try {
    const chosen = localStorage.getItem("theme");
    if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  } catch {
    /* a browser may keep nothing for pages from files */
  }
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("theme", root.dataset.theme);
    } catch {
      /* as above */
    }
    show();
  });
  system.addEventListener("change", show);
  button.hidden = false;
  show();
}

/* One click sorts upwards, the next downwards, the third as it was. Cells without a number come after those with one. */
function compare(one, other, sign) {
  const [hasOne, hasOther] = [one.dataset.order !== undefined, other.dataset.order !== undefined];
  if (hasOne !== hasOther) return hasOne ? -1 : 1;
  if (hasOne) return sign * (Number(one.dataset.order) - Number(other.dataset.order)) || 0;
  return sign * one.textContent.localeCompare(other.textContent, "en", { numeric: true });
}

function makeSortable(table) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  for (const button of table.querySelectorAll(".sort")) {
    const head = button.closest("th");
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: null }[head.getAttribute("aria-sort")];
      const order = next === undefined ? "ascending" : next;
      for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
      const place = head.cellIndex;
      const sign = order === "descending" ? -1 : 1;
      const rows = [...original];
      if (order) {
        head.setAttribute("aria-sort", order);
        rows.sort((one, other) => compare(one.cells[place], other.cells[place], sign));
      }
      body.append(...rows);
    });
  }
}

/* Notes and lists of runs open on a click, a tap or Enter, notes also under the mouse; they stand beside their cell. */
function place(pop, button) {
  const at = button.getBoundingClientRect();
  const room = document.documentElement.getBoundingClientRect();
  const left = Math.min(at.left, room.width - pop.offsetWidth - 8);
  const below = at.bottom + 6;
  const fits = below + pop.offsetHeight <= innerHeight;
  pop.style.left = `${Math.max(8, left)}px`;
  pop.style.top = `${fits ? below : Math.max(8, at.top - pop.offsetHeight - 6)}px`;
}

function addPopover(button) {
  const pop = document.getElementById(button.getAttribute("popovertarget"));
  let clicked = false;
  let leaving = 0;
  const isMine = () => pop.matches(":popover-open") && pop.shownBy === button;
  const show = () => {
    pop.shownBy = button;
    pop.showPopover({ source: button });
    place(pop, button);
  };
  button.addEventListener("click", (event) => {
    event.preventDefault();
    if (isMine() && clicked) {
      pop.hidePopover();
      return;
    }
    if (!isMine()) {
      if (pop.matches(":popover-open")) pop.hidePopover();
      show();
    }
    clicked = true;
  });
  if (pop.getAttribute("role") !== "tooltip") return;
  const leave = () => {
    leaving = setTimeout(() => isMine() && !clicked && pop.hidePopover(), 150);
  };
  const stay = () => clearTimeout(leaving);
  button.addEventListener("pointerenter", (event) => {
    stay();
    if (event.pointerType !== "mouse" || pop.matches(":popover-open")) return;
    clicked = false;
    show();
  });
  button.addEventListener("pointerleave", leave);
  pop.addEventListener("pointerenter", stay);
  pop.addEventListener("pointerleave", leave);
}

/* Figures: the wheel zooms with Ctrl, or once the figure has the focus, so that scrolling the page stays possible. */
function makeZoomable(figure) {
  const frame = figure.querySelector(".frame");
  const drawing = frame.querySelector("svg");
  const scrolls = "pan-x pan-y";
  const panzoom = Panzoom(drawing, {
    maxScale: 12,
    minScale: 1,
    contain: "outside",
    panOnlyWhenZoomed: true,
    cursor: "default",
    touchAction: scrolls,
    handleStartEvent: (event) => {
      event.preventDefault();
      frame.focus({ preventScroll: true });
    },
  });
  drawing.addEventListener("panzoomchange", ({ detail }) => {
    const zoomed = detail.scale > 1.001;
    panzoom.setOptions({ touchAction: zoomed ? "none" : scrolls, cursor: zoomed ? "move" : "default" });
  });
  frame.addEventListener(
    "wheel",
    (event) => {
      const asked = event.ctrlKey || event.metaKey || document.activeElement === frame;
      const scrollsOn = !event.ctrlKey && event.deltaY > 0 && panzoom.getScale() <= 1;
      if (asked && !scrollsOn) panzoom.zoomWithWheel(event);
    },
    { passive: false },
  );
  /* At once: while an animation runs, Panzoom measures the drawing on its way and holds it to the wrong bounds. */
  const atOnce = { animate: false };
  const acts = {
    in: () => panzoom.zoomIn(atOnce),
    out: () => panzoom.zoomOut(atOnce),
    reset: () => panzoom.reset(atOnce),
  };
  const move = (x, y) => panzoom.pan(x, y, { relative: true, ...atOnce });
  const step = 40;
  const keys = {
    "+": acts.in, "=": acts.in, "-": acts.out, 0: acts.reset,
    ArrowLeft: () => move(step, 0), ArrowRight: () => move(-step, 0),
    ArrowUp: () => move(0, step), ArrowDown: () => move(0, -step),
  };
  frame.addEventListener("keydown", (event) => {
    const isArrow = event.key.startsWith("Arrow");
    if (!(event.key in keys) || event.ctrlKey || event.metaKey || (isArrow && panzoom.getScale() <= 1)) return;
    event.preventDefault();
    keys[event.key]();
  });
  for (const button of figure.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", acts[button.dataset.zoom]);
  }
  figure.querySelector(".zoom").hidden = false;
}

/* What stands beside a cell does not follow it when the page or the table moves. */
function hideOnScroll(event) {
  for (const pop of document.querySelectorAll(":popover-open")) if (!pop.contains(event.target)) pop.hidePopover();
}

addThemeSwitch(document.querySelector(".theme"));
document.addEventListener("scroll", hideOnScroll, { capture: true, passive: true });
if (matchMedia("(max-width: 60rem)").matches) document.querySelector("nav details").open = false;
document.querySelectorAll("table").forEach(makeSortable);
document.querySelectorAll("[popovertarget]").forEach(addPopover);
document.querySelectorAll("figure").forEach(makeZoomable);
